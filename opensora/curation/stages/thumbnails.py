"""Luminance and small pictures of frames."""

from __future__ import annotations

import numpy as np

LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # of R, G and B, ITU-R BT.601


def luminance(frame: np.ndarray) -> np.ndarray:
    """The luminance of a frame [H, W, 3] in levels, float32 [H, W]."""
    return frame.astype(np.float32) @ LUMINANCE


def thumbnail(levels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Means of `levels` [H, W] over blocks, at most [rows, columns]; every pixel counts once."""
    for axis, count in enumerate((rows, columns)):
        size = levels.shape[axis]
        edges = np.arange(min(count, size) + 1) * size // min(count, size)
        shape = (-1, 1) if axis == 0 else (1, -1)
        levels = np.add.reduceat(levels, edges[:-1], axis) / np.diff(edges).astype(np.float32).reshape(shape)
    return levels
