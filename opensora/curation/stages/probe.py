"""Sizes, lengths and rates from headers and packets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from opensora.curation.clip import Clip
from opensora.curation.stages.stage import Columns, Stage
from opensora.datasets.folder_table import media_size


@dataclass(frozen=True)
class Probe(Stage):
    """num_frames, width, height, aspect_ratio (height / width), resolution (height x width), fps of a clip."""

    name: ClassVar[str] = "probe"
    columns: ClassVar[tuple[str, ...]] = ("num_frames", "width", "height", "aspect_ratio", "resolution", "fps")

    def process(self, clip: Clip) -> Columns:
        size = media_size(Path(clip.path), clip.span, clip.crop)
        return {
            "num_frames": size.num_frames, "width": size.width, "height": size.height,
            "aspect_ratio": size.aspect_ratio, "resolution": size.resolution, "fps": size.fps,
        }  # fmt: skip
