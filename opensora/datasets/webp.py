"""Animated WebP images, frame by frame: FFmpeg does not read them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from opensora.datasets.decoding import DEFAULT_FPS, check_pixels, check_side, opened_image
from opensora.errors import MediaError

MAX_CHUNKS = 100_000  # of a file
UNSAID = 100  # milliseconds that players show a frame without a duration


class Moving(NamedTuple):
    """What an animated image holds: frames of a size in pixels, at an average rate."""

    num_frames: int
    fps: float
    height: int
    width: int


def find(path: str | Path) -> Moving | None:
    """What an animated WebP holds, by its chunk headers; None for any other file.

    MediaError for more than 8192 pixels a side, or 2**29 pixels in all.
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
                size = tuple(int.from_bytes(content[at : at + 3], "little") + 1 for at in (7, 4))
            elif kind == b"ANMF":
                durations.append(int.from_bytes(content[12:15], "little") or UNSAID)
            if len(content) < min(length, 16) or not kind:
                break
            file.seek(length + length % 2 - len(content), os.SEEK_CUR)
    if len(durations) < 2:
        return None
    check_side(path, *size)
    check_pixels(path, len(durations), *size)
    return Moving(len(durations), 1000 * len(durations) / sum(durations) or DEFAULT_FPS, *size)


def frames(path: str | Path) -> Iterator[np.ndarray]:
    """The frames uint8 [H, W, 3], without transparency. MediaError if one of them cannot be read."""
    with opened_image(path) as image:
        for number in range(image.n_frames):
            image.seek(number)
            yield np.array(image.convert("RGB"))
        if image.n_frames < 2:
            raise MediaError(f"{path}: is cut off; save it anew as MP4")
