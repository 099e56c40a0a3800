"""The picture within black bars."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from opensora.curation.clip import Clip
from opensora.datasets.video import Crop

DARK = 20  # levels, below which a line is a bar
SAMPLES = 8  # frames that are looked at
LIT = 0.01  # fraction of bright pixels that a line of the picture has; fewer are noise of the compression


def find_picture(clip: Clip, samples: int = SAMPLES, dark: float = DARK) -> Crop | None:
    """The part of a clip's frames within black bars, by some of its frames; None if all of them are dark."""
    frames, _ = clip.sampled(samples, lambda frame: frame.max(-1))
    return picture_rectangle(frames, dark)


def picture_rectangle(frames: Iterable[np.ndarray], dark: float) -> Crop | None:
    """The part of frames [H, W] whose lines reach `dark` levels in one of them; None if all are dark."""
    brightest: np.ndarray | None = None
    for frame in frames:
        brightest = frame if brightest is None else np.maximum(brightest, frame)
    if brightest is None:
        return None
    lit = brightest >= dark
    rows, columns = np.flatnonzero(lit.mean(1) > LIT), np.flatnonzero(lit.mean(0) > LIT)
    if not len(rows) or not len(columns):
        return None
    return Crop(int(rows[0]), int(columns[0]), int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1))


def cropped(frame: np.ndarray, crop: Crop | None) -> np.ndarray:
    """This part of a frame [H, W, ...]; all of it for None."""
    if crop is None:
        return frame
    return frame[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
