"""Copies of films, as sites make them, and faults of files."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BAR = 0.125  # of the side, at each of its ends
LATER = 6  # frames that a shifted copy lacks at its beginning
STILL = 24  # frames of a black or frozen part


class Copy(NamedTuple):
    """How a copy is made: frames to its frames, the quality of x264, and the frames that it lacks at the beginning."""

    change: Callable[[np.ndarray], np.ndarray]
    crf: int = 10
    later: int = 0


class Fault(NamedTuple):
    """How a fault is made: frames to frames, and the factor of the frame rate that the file states."""

    change: Callable[[np.ndarray], np.ndarray]
    rate: float = 1


def resized(frames: np.ndarray, share: float) -> np.ndarray:
    """Frames scaled to this share of their sides, rounded to even numbers."""
    from PIL import Image

    height, width = (2 * round(side * share / 2) for side in frames.shape[1:3])
    return np.stack(
        [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in frames]
    )


def barred(frames: np.ndarray, axis: int) -> np.ndarray:
    """Frames with black bars added at both ends of an axis: 1 for a letterbox, 2 for a pillarbox."""
    widths = [(0, 0)] * 4
    widths[axis] = (2 * round(frames.shape[axis] * BAR / 2),) * 2
    return np.pad(frames, widths)


def _black(frames: np.ndarray) -> np.ndarray:
    return np.concatenate([frames, np.zeros_like(frames[:1]).repeat(STILL, 0)])


def _frozen(frames: np.ndarray) -> np.ndarray:
    middle = len(frames) // 2
    return np.concatenate([frames[:middle], frames[middle : middle + 1].repeat(STILL, 0), frames[middle:]])


COPIES = {
    "re-encoded": Copy(lambda frames: frames, crf=32),
    "resized": Copy(lambda frames: resized(frames, 0.6)),
    "letterboxed": Copy(lambda frames: barred(frames, 1)),
    "shifted": Copy(lambda frames: frames[LATER:], later=LATER),
    "all of these": Copy(lambda frames: barred(resized(frames[LATER:], 0.8), 1), crf=28, later=LATER),
}
FAULTS = {
    "black": Fault(_black),
    "frozen": Fault(_frozen),
    "letterbox": Fault(lambda frames: barred(frames, 1)),
    "pillarbox": Fault(lambda frames: barred(frames, 2)),
    "fps": Fault(lambda frames: frames.repeat(2, 0), rate=2),  # each frame twice
    "truncated": Fault(lambda frames: frames),
}
