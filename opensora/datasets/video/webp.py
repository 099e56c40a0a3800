"""Animated WebP images, which FFmpeg does not read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from opensora.datasets.video.container import DEFAULT_FPS, check_pixels, check_side, opened_image
from opensora.errors import MediaError

MAX_CHUNKS = 100_000
DEFAULT_DURATION = 100  # milliseconds, as in players


class AnimationInfo(NamedTuple):
    """Frame count, average frame rate, and size in pixels of an animated image."""

    num_frames: int
    fps: float
    height: int
    width: int


def probe(path: str | Path) -> AnimationInfo | None:
    """Reads the chunk headers of an animated WebP; None for any other file.

    Raises MediaError for more than 8192 pixels a side or 2**29 pixels in total.
    """
    if not os.path.isfile(path):
        return None
    durations, size = [], (0, 0)
    with suppress(OSError), open(path, "rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WEBP":
            return None
        for _ in range(MAX_CHUNKS):
            kind, length = file.read(4), int.from_bytes(file.read(4), "little")
            content = file.read(min(length, 16))
            if kind == b"VP8X":
                size = (int.from_bytes(content[7:10], "little") + 1, int.from_bytes(content[4:7], "little") + 1)
            elif kind == b"ANMF":
                durations.append(int.from_bytes(content[12:15], "little") or DEFAULT_DURATION)
            if len(content) < min(length, 16) or not kind:
                break
            file.seek(length + length % 2 - len(content), os.SEEK_CUR)
    if len(durations) < 2:
        return None
    check_side(path, *size)
    check_pixels(path, len(durations), *size)
    return AnimationInfo(len(durations), 1000 * len(durations) / sum(durations) or DEFAULT_FPS, *size)


def frames(path: str | Path) -> Iterator[np.ndarray]:
    """Yields the frames uint8 [H, W, 3], without transparency. Raises MediaError if one cannot be read."""
    with opened_image(path) as image:
        for number in range(image.n_frames):
            image.seek(number)
            yield np.array(image.convert("RGB"))
        if image.n_frames < 2:
            raise MediaError(f"{path}: is cut off; re-save it as MP4")
