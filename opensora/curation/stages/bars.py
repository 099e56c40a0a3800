"""The picture within black bars."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from opensora.curation.clip import Clip
from opensora.datasets.video import Crop

DARK = 20  # levels, below which a line is a bar
SAMPLES = 8  # frames that are looked at
LIT = 0.01  # fraction of bright pixels of a line, below which it is black
FULL = 0.5  # of a line of the picture
EDGE, EDGE_LINES = 0.02, 16  # share and number of lines between the two: rings of the compression, within a block


def find_picture(clip: Clip, samples: int = SAMPLES, dark: float = DARK) -> Crop | None:
    """The part of a clip's frames within black bars, by some of its frames; None if all of them are dark."""
    frames, _ = clip.sampled(samples, lambda frame: frame.max(-1))
    return picture_rectangle(frames, dark)


def picture_rectangle(frames: Iterable[np.ndarray], dark: float) -> Crop | None:
    """The part of frames [H, W] within black bars; None if no pixel reaches `dark` levels in one of the frames.

    A bar begins with a black line and ends at a straight edge: within a few lines most pixels are bright. Where lines
    get bright little by little the picture itself is dark, such as around a light on a black ground.
    """
    brightest: np.ndarray | None = None
    for frame in frames:
        brightest = frame if brightest is None else np.maximum(brightest, frame)
    if brightest is None or not (brightest >= dark).any():
        return None
    lit = brightest >= dark
    (top, bottom), (left, right) = (_ends(lit.mean(axis)) for axis in (1, 0))
    return Crop(top, left, bottom - top, right - left)


def _ends(bright: np.ndarray) -> tuple[int, int]:
    """First and last (exclusive) of the lines, given the fraction of bright pixels of each [N], that lie in no bar."""
    before, after = (_bar(line) for line in (bright, bright[::-1]))
    return before, len(bright) - after


def _bar(bright: np.ndarray) -> int:
    """The number of lines of the bar at the beginning."""
    lit, full = np.flatnonzero(bright > LIT), np.flatnonzero(bright >= FULL)
    if not len(full) or not lit[0] or full[0] - lit[0] > max(EDGE_LINES, EDGE * len(bright)):
        return 0
    return int(full[0])


def cropped(frame: np.ndarray, crop: Crop | None) -> np.ndarray:
    """This part of a frame [H, W, ...]; all of it for None."""
    if crop is None:
        return frame
    return frame[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
