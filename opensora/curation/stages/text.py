"""Text in the picture, by RapidOCR's models, which its package brings along."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from opensora.curation.clip import Clip
from opensora.curation.stages.stage import Columns, Stage
from opensora.errors import ConfigError

PACKAGE = "rapidocr_onnxruntime"
MAP_SIDE = 256  # of the map on which boxes are drawn
BAND = 0.25  # of the height: the part at the bottom that holds subtitles


@dataclass(frozen=True)
class Text(Stage):
    """Text in `samples` frames; the frame with the most of it counts.

    ocr: number of text regions; text_area: fraction of the frame that their boxes cover; subtitle_area: fraction of the
    lowest quarter. A region is detected (DBNet, PP-OCRv4) and read with a confidence of at least `score` as two or more
    letters or digits, so that textures do not count.
    """

    samples: int = 3
    score: float = 0.6

    name: ClassVar[str] = "text"
    columns: ClassVar[tuple[str, ...]] = ("ocr", "text_area", "subtitle_area")

    def setup(self) -> None:
        _package_folder()

    def weights(self) -> Mapping[str, str]:
        folder = _package_folder() / "models"
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.onnx"))}

    @cached_property
    def reader(self) -> Any:
        """The reader, on one thread, so that the number of cores does not matter; loaded with the first clip."""
        from rapidocr_onnxruntime import RapidOCR

        return RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)

    def process(self, clip: Clip) -> Columns:
        measured, _ = clip.sampled(self.samples, self.measure)
        most = np.max(measured, axis=0)
        return {"ocr": int(most[0]), "text_area": round(float(most[1]), 4), "subtitle_area": round(float(most[2]), 4)}

    def measure(self, frame: np.ndarray) -> list[float]:
        """Regions, covered fraction of the frame, and of its lowest quarter, of a frame [H, W, 3]."""
        boxes = self.boxes(frame)
        covered = cover(boxes, *frame.shape[:2])
        return [len(boxes), float(covered.mean()), float(covered[-round(BAND * MAP_SIDE) :].mean())]

    def boxes(self, frame: np.ndarray) -> list[np.ndarray]:
        """The corners [4, 2] (x, y) of the text regions of a frame."""
        found, _ = self.reader(np.ascontiguousarray(frame[..., ::-1]), use_cls=False)
        return [
            np.array(corners, float)
            for corners, text, score in found or ()
            if float(score) >= self.score and sum(map(str.isalnum, text)) >= 2
        ]


def cover(boxes: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Which points of a grid [MAP_SIDE, MAP_SIDE] over the frame lie in a box (their upright hulls)."""
    covered = np.zeros((MAP_SIDE, MAP_SIDE), bool)
    for corners in boxes:
        scaled = corners * MAP_SIDE / np.array([width, height])
        (left, top), (right, bottom) = np.clip(np.round([scaled.min(0), scaled.max(0)]).astype(int), 0, MAP_SIDE)
        covered[top:bottom, left:right] = True
    return covered


def _package_folder() -> Path:
    """Where RapidOCR is installed. Raises ConfigError if it is not."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError("the stage text needs rapidocr-onnxruntime; pip install 'opensora[data]'")
    return Path(spec.origin).parent
