"""Rendered footage with known truth: scenes with known cuts, faults of known kinds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opensora.datasets.video import write_video

HEIGHT, WIDTH = 96, 160


def texture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A smooth random picture [H, W, 3] uint8."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 1, (6, 8, 3))
    rows, columns = np.linspace(0, 5, height), np.linspace(0, 7, width)
    low_rows, low_columns = np.minimum(rows.astype(int), 4), np.minimum(columns.astype(int), 6)
    down, right = (rows - low_rows)[:, None, None], (columns - low_columns)[None, :, None]
    corner = [[coarse[low_rows + a][:, low_columns + b] for b in (0, 1)] for a in (0, 1)]
    top = corner[0][0] * (1 - right) + corner[0][1] * right
    bottom = corner[1][0] * (1 - right) + corner[1][1] * right
    return (255 * (top * (1 - down) + bottom * down)).round().astype(np.uint8)


def scene(seed: int, frames: int) -> np.ndarray:
    """A textured square that moves over a texture: [T, H, W, 3] uint8."""
    background, patch = texture(seed), texture(seed + 1000, 32, 32)
    clip = np.repeat(background[None], frames, 0)
    for number in range(frames):
        left = (5 + 2 * number) % (WIDTH - 32)
        clip[number, 30:62, left : left + 32] = patch
    return clip


def footage(path: Path, lengths: Sequence[int], seed: int = 0, fps: float = 24) -> Path:
    """A video of scenes with hard cuts between them."""
    return write_video(np.concatenate([scene(seed + n, length) for n, length in enumerate(lengths)]), path, fps)
