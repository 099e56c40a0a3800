"""Sharpness, brightness, contrast and clipped levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from opensora.curation.clip import Clip
from opensora.curation.stages.stage import Columns, Stage
from opensora.curation.stages.thumbnails import luminance


@dataclass(frozen=True)
class Quality(Stage):
    """Means over `samples` frames, of their luminance Y (ITU-R BT.601, levels 0 to 255) at the size of the source.

    sharpness: the variance of the Laplacian of Y (Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield
    microscopy"); low for blur, high for detail and for noise. brightness: mean of Y / 255. contrast: standard deviation
    of Y / 255 (RMS contrast, Peli 1990). highlights, shadows: fractions of pixels with Y >= `white` and Y <= `black`.
    """

    samples: int = 8
    white: int = 250
    black: int = 5

    name: ClassVar[str] = "quality"
    columns: ClassVar[tuple[str, ...]] = ("sharpness", "brightness", "contrast", "highlights", "shadows")

    def process(self, clip: Clip) -> Columns:
        measured, _ = clip.sampled(self.samples, self.measure)
        means = np.mean(measured, axis=0)
        return {name: round(float(value), 4) for name, value in zip(self.columns, means, strict=True)}

    def measure(self, frame: np.ndarray) -> list[float]:
        """The values of one frame [H, W, 3], in the order of the columns."""
        levels = luminance(frame)
        return [
            float(laplacian(levels).var()), float(levels.mean()) / 255, float(levels.std()) / 255,
            float((levels >= self.white).mean()), float((levels <= self.black).mean()),
        ]  # fmt: skip


def laplacian(levels: np.ndarray) -> np.ndarray:
    """The 4-neighbour Laplacian of [H, W], with edges repeated."""
    padded = np.pad(levels, 1, mode="edge")
    return padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * levels
