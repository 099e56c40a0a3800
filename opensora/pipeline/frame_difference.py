"""How far the frames of one file are from those of another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from opensora.datasets.video import is_image, iterate_video, read_image
from opensora.errors import MediaError

# Videos whose latents differ in the last digits, by 4e-6 of their scale, are at least 54 dB apart once compressed.
ROUNDING = 50.0


class FrameDifference(NamedTuple):
    """The difference between frames uint8."""

    largest: int  # of 255 levels
    share: float  # of the values that differ
    psnr: float  # in dB; infinite if nothing differs

    def __str__(self) -> str:
        if not self.largest:
            return "none"
        text = f"at most {self.largest} of 255 levels, in {self.share:.2%} of the values; PSNR {self.psnr:.1f} dB"
        return f"{text}: no more than rounding and compression cause" if self.psnr > ROUNDING else text


def compare_frames(file: Path, other: Path, num_frames: int) -> FrameDifference | None:
    """Compares `num_frames` decoded frames of two files, one pair in memory; None if the files cannot be compared."""
    largest = values = differing = squares = 0
    try:
        for one, two in itertools.zip_longest(_frames(file, num_frames), _frames(other, num_frames)):
            if one is None or two is None or one.shape != two.shape:
                return None
            error = np.abs(one.astype(np.int16) - two)
            largest = max(largest, int(error.max()))
            values, differing = values + error.size, differing + int(np.count_nonzero(error))
            squares += int(np.square(error, dtype=np.int64).sum())
    except MediaError:
        return None
    psnr = 10 * math.log10(255**2 * values / squares) if squares else math.inf
    return FrameDifference(largest, differing / values, psnr)


def _frames(file: Path, num_frames: int) -> Iterator[np.ndarray]:
    return iter((read_image(file),)) if is_image(file) else iterate_video(file, num_frames)
