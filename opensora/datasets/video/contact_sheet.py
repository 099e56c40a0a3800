"""Contact sheets: frames laid out in one image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def contact_sheet(frames: np.ndarray, columns: int | None = None, most: int = 12, side: int = 160) -> np.ndarray:
    """One image uint8 [H, W, 3] with up to `most` evenly spaced frames of uint8 [T, H, W, 3], row by row.

    Frames with a long side below `side` pixels are enlarged by an integer factor, those above 3 * `side` reduced.
    """
    indices = np.unique(np.linspace(0, len(frames) - 1, most).round().astype(int))
    long_side = max(frames.shape[1:3])
    enlarge, reduce = max(1, math.ceil(side / long_side)), max(1, long_side // (3 * side))
    tiles = frames[indices][:, ::reduce, ::reduce].repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    return tile(tiles, columns or min(len(tiles), 4))


def tile(images: Sequence[np.ndarray], columns: int, gap: int = 4) -> np.ndarray:
    """Lays out images uint8 [H, W, 3] of one size in a grid on dark gray, `gap` pixels apart."""
    blank = -len(images) % columns
    tiles = np.pad(np.stack(images), ((0, blank), (gap, 0), (gap, 0), (0, 0)), constant_values=40)
    rows = [np.hstack(list(tiles[first : first + columns])) for first in range(0, len(tiles), columns)]
    return np.pad(np.vstack(rows), ((0, gap), (0, gap), (0, 0)), constant_values=40)
