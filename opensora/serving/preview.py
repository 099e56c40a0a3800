"""Small moving pictures of what a clip will look like, made while it is sampled."""

from __future__ import annotations

import base64
import time

import numpy as np

from opensora.datasets.video import encode_animation
from opensora.pipeline.step import Step

SHARE = 0.2  # of the time, that previews may take
SIDE, FRAMES = 256, 16  # at most, of a preview


class Previews:
    """Previews of one run, as often as takes a small share of the time."""

    def __init__(self) -> None:
        self._next: dict[int, float] = {}  # row -> time from which on it may be decoded again

    def next(self, step: Step, row: int) -> str | None:
        """The predicted clip as base64 of an animated WebP; None while the next one is not due."""
        begin = time.perf_counter()
        if begin < self._next.get(row, 0.0):
            return None
        image = base64.b64encode(encode_animation(shrink(step.frames(row)))).decode()
        end = time.perf_counter()
        self._next[row] = end + (end - begin) * (1 / SHARE - 1)
        return image


def shrink(frames: np.ndarray) -> np.ndarray:
    """At most `FRAMES` evenly spaced frames uint8 [T, H, W, 3], with sides of at most `SIDE` pixels."""
    indices = np.unique(np.linspace(0, len(frames) - 1, FRAMES).round().astype(int))
    stride = -(-max(frames.shape[1:3]) // SIDE)
    return frames[indices][:, ::stride, ::stride]
