"""Perceptual hashes over time, by which near duplicates are found."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from opensora.curation.clip import Clip
from opensora.curation.stages.bars import cropped, find_picture
from opensora.curation.stages.stage import Columns, Stage
from opensora.curation.stages.thumbnails import luminance, thumbnail

RATE = 4  # hashes per second
MAX_HASHES = 256
SIDE = 32  # of the picture that is transformed
KEPT = 8  # frequencies of each axis
FLAT = 4.0  # levels of standard deviation, below which a picture has no hash
NONE = "-"


@dataclass(frozen=True)
class Duplicates(Stage):
    """phash: hashes of 64 bits as hexadecimal words, four per second of the first 64 seconds; `-` for flat pictures.

    The hash says which of the 8x8 lowest frequencies (discrete cosine transform) of a 32x32 picture exceed their median
    (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions"), lowest frequencies first. Black
    bars are left out.
    `opensora data edit --near-duplication` compares the hashes of a table.
    """

    name: ClassVar[str] = "duplicates"
    columns: ClassVar[tuple[str, ...]] = ("phash",)

    def process(self, clip: Clip) -> Columns:
        fps = clip.frames_per_second() or RATE

        def choose(total: int) -> list[int]:
            times = np.arange(min(MAX_HASHES, int(total / fps * RATE) + 1)) / RATE
            return sorted({min(round(time * fps), total - 1) for time in times.tolist()})

        picture = find_picture(clip)
        hashes, _ = clip.frames(choose, lambda frame: perceptual_hash(luminance(cropped(frame, picture))))
        return {"phash": " ".join(hashes)}


def perceptual_hash(levels: np.ndarray) -> str:
    """The 64-bit hash of a picture [H, W] as 16 hexadecimal digits, or `-` if it is flat."""
    small = _scaled(levels, SIDE)
    if small.std() < FLAT:
        return NONE
    basis = _cosines()
    frequencies = (basis @ small @ basis.T).ravel()
    bits = frequencies > np.median(frequencies[1:])  # the first is the mean of the picture
    return np.packbits(bits[_lowest_first()]).tobytes().hex()


def _scaled(levels: np.ndarray, side: int) -> np.ndarray:
    """A picture [H, W] averaged over blocks, or repeated where it is smaller, as [side, side]."""
    height, width = levels.shape
    levels = np.repeat(np.repeat(levels, -(-side // height), 0), -(-side // width), 1)
    return thumbnail(levels, side, side)


@cache
def _cosines() -> np.ndarray:
    """The lowest KEPT vectors of the discrete cosine transform (DCT-II) of SIDE values: [KEPT, SIDE]."""
    return np.cos(np.pi * np.arange(KEPT)[:, None] * (2 * np.arange(SIDE) + 1) / (2 * SIDE)).astype(np.float32)


@cache
def _lowest_first() -> np.ndarray:
    """The places of the frequencies in a flat [KEPT, KEPT], from the lowest to the highest."""
    rows, columns = np.mgrid[:KEPT, :KEPT]
    return np.argsort((rows + columns).ravel(), kind="stable")
