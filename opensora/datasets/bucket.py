"""Three-level buckets: the resolution, number of frames and aspect ratio that each row of a table is trained at.

A configuration is `{resolution: {num_frames: (keep, batch_size)}}`. `keep` is the probability that a row which fits
stays; as a tuple `(keep, keep_frames)` a second probability, asked first, lets longer clips be cut to fewer frames.
All rows are placed at once. A draw depends on (seed, epoch, entry, row) alone: epochs and entries are independent,
and rows added at the end of a table change nothing for those before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from opensora.datasets.aspect import NUM_PIXELS, SIZES, resolution_name
from opensora.errors import ConfigError

Column = Sequence[float] | np.ndarray
MOST_RATIOS = 64  # above the number of ratios of any resolution
CHUNK = 2**18  # rows placed together: what they need fits into a processor's cache
DRAWS = 0  # what a stream of random numbers is for; the samplers number theirs from 1


class Fate(IntEnum):
    """How far a row came; the furthest of all entries counts."""

    UNKNOWN_SIZE = 0
    TOO_SMALL = 1
    NO_IMAGES = 2
    TOO_SHORT = 3
    KEEP_IS_ZERO = 4
    NOT_DRAWN = 5
    PLACED = 6


REASONS = {
    Fate.UNKNOWN_SIZE: "num_frames, height or width is not known",
    Fate.TOO_SMALL: "fewer pixels than 0.8 of the smallest resolution",
    Fate.NO_IMAGES: "an image, and no resolution of its size has an entry for 1 frame",
    Fate.TOO_SHORT: "fewer frames than any entry of its size asks for",
    Fate.KEEP_IS_ZERO: "kept out by a keep probability of 0",
    Fate.NOT_DRAWN: "not drawn in this epoch (keep probability below 1)",
}


class Bucket(NamedTuple):
    """What the samples of one batch have in common; `ratio` is a key of the resolution's table of sizes."""

    resolution: str
    num_frames: int
    ratio: str

    @property
    def size(self) -> tuple[int, int, int]:
        """(T, H, W) in frames and pixels."""
        return (self.num_frames, *SIZES[self.resolution][self.ratio])

    def __str__(self) -> str:
        return f"{self.resolution} {self.num_frames}f {self.ratio}"


class Entry(NamedTuple):
    """One line of the configuration; `batch_size` is None where no row can stay."""

    resolution: str
    num_frames: int
    keep: float
    keep_frames: float
    batch_size: int | None


class Buckets:
    """The entries of a bucket configuration, checked, in the order in which they are tried.

    Resolutions come from most to fewest pixels (as configured where equal), frame counts from most to fewest.
    Raises ConfigError for what is not understood.
    """

    def __init__(self, config: dict[str, dict[int, Any]]) -> None:
        tables: dict[str, list[Entry]] = {}
        for name, table in config.items():
            resolution = resolution_name(name)
            if resolution in tables:
                raise ConfigError(f"bucket_config names {resolution} twice; merge the two")
            if not isinstance(table, dict):
                raise ConfigError(f"bucket_config: {resolution} must be {{num_frames: (keep, batch_size)}}")
            entries = (_entry(resolution, num_frames, value) for num_frames, value in table.items())
            tables[resolution] = sorted(entries, key=lambda entry: -entry.num_frames)
        order = sorted(tables, key=lambda resolution: -NUM_PIXELS[resolution])
        self.entries = tuple(entry for resolution in order for entry in tables[resolution])

    @property
    def num_buckets(self) -> int:
        """How many (resolution, frames, ratio) there are."""
        return sum(len(SIZES[entry.resolution]) for entry in self.entries)

    def place(
        self, num_frames: Column, height: Column, width: Column, *, seed: int, epoch: int = 0, frame_interval: int = 1
    ) -> Placement:
        """The bucket of every row, or why it has none; columns are [N], and a cell that is no positive number unknown.

        A row enters a resolution with at least 0.8 of its pixels. An image takes the entry for 1 frame; a video the
        longest with `T >= num_frames * frame_interval`. A row that fits and is not kept goes to the next resolution.
        """
        columns = [np.asarray(column) for column in (num_frames, height, width)]
        count = len(columns[0])
        entry, ratio, fate = np.empty(count, np.int16), np.empty(count, np.int16), np.empty(count, np.int8)
        for start in range(0, count, CHUNK):
            rows = slice(start, start + CHUNK)
            sizes = [_whole_numbers(column[rows]) for column in columns]
            entry[rows], fate[rows] = self._enter(*sizes, start, (int(seed), epoch, DRAWS), frame_interval)
            ratio[rows] = self._ratios(entry[rows], *sizes[1:])
        return Placement(self.entries, entry, ratio, fate)

    def _enter(
        self, frames: np.ndarray, height: np.ndarray, width: np.ndarray, start: int, key: tuple[int, ...], interval: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The entry and the fate of the rows from `start` on."""
        known, pixels, image = (frames > 0) & (height > 0) & (width > 0), height * width, frames == 1
        entry = np.full(len(frames), -1, np.int16)
        fate = np.where(known, Fate.TOO_SMALL, Fate.UNKNOWN_SIZE).astype(np.int8)
        for resolution, numbered in groupby(enumerate(self.entries), lambda pair: pair[1].resolution):
            inside = known & (entry < 0) & (5 * pixels >= 4 * NUM_PIXELS[resolution])
            _reached(fate, inside & image, Fate.NO_IMAGES)
            _reached(fate, inside & ~image, Fate.TOO_SHORT)
            for index, asked in numbered:
                fits = inside & (image if asked.num_frames == 1 else frames >= asked.num_frames * interval)
                never = asked.keep * asked.keep_frames == 0
                _reached(fate, fits, Fate.KEEP_IS_ZERO if never else Fate.NOT_DRAWN)
                fits &= _happens(asked.keep_frames, len(frames), start, *key, index, 0)
                kept = fits & _happens(asked.keep, len(frames), start, *key, index, 1)
                entry[kept], fate[kept] = index, Fate.PLACED
                inside &= ~fits
        return entry, fate

    def _ratios(self, entry: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
        """The position of the nearest ratio in the table of each row's resolution, -1 for a row without an entry."""
        ratio = np.full(len(entry), -1, np.int16)
        for resolution in {asked.resolution for asked in self.entries}:
            own = [asked.resolution == resolution for asked in self.entries]
            rows = np.flatnonzero(np.array([*own, False])[entry])  # -1 finds the last
            ratio[rows] = _nearest(height[rows] / width[rows], [float(key) for key in SIZES[resolution]])
        return ratio


@dataclass(frozen=True)
class Placement:
    """Where the rows of a table went; `entry` and `ratio` are positions [N], -1 for none, `fate` is a Fate [N]."""

    entries: tuple[Entry, ...]
    entry: np.ndarray
    ratio: np.ndarray
    fate: np.ndarray

    def __getitem__(self, row: int) -> Bucket | None:
        code = int(self.entry[row]) * MOST_RATIOS + int(self.ratio[row])
        return None if code < 0 else self._bucket(code)

    def groups(self) -> tuple[list[Bucket], np.ndarray, np.ndarray, np.ndarray]:
        """(buckets [G] by their first row, batch sizes [G], placed rows [P] ascending, the bucket of each [P])."""
        rows = np.flatnonzero(self.entry >= 0)
        codes = self.entry[rows] * np.int32(MOST_RATIOS) + self.ratio[rows]
        first = np.full(len(self.entries) * MOST_RATIOS, len(rows))
        first[codes[::-1]] = np.arange(len(rows) - 1, -1, -1)  # the last value for an index is the one that stays
        found = np.argsort(first, kind="stable")[: np.count_nonzero(first < len(rows))]
        number = np.zeros(len(first), np.int16 if len(first) < 2**15 else np.int32)  # 16 bits sort fastest
        number[found] = np.arange(len(found))
        batch_sizes = [self.entries[code // MOST_RATIOS].batch_size for code in found]
        return [self._bucket(int(code)) for code in found], np.array(batch_sizes, np.int64), rows, number[codes]

    def _bucket(self, code: int) -> Bucket:
        asked = self.entries[code // MOST_RATIOS]
        return Bucket(asked.resolution, asked.num_frames, list(SIZES[asked.resolution])[code % MOST_RATIOS])


def random_words(count: int, seed: int, epoch: int, purpose: int, *key: int, start: int = 0) -> np.ndarray:
    """uint64 [count] from number `start` on; none depends on `count`, nor on the version of NumPy."""
    words = [seed % 2**32, (seed >> 32) % 2**32, epoch, purpose, *key]
    return np.random.PCG64(np.random.SeedSequence(words)).advance(start).random_raw(count)


def _happens(probability: float, count: int, start: int, *key: int) -> np.ndarray | bool:
    if probability <= 0 or probability >= 1:
        return probability >= 1
    return (random_words(count, *key, start=start) >> np.uint64(11)) * 2.0**-53 < probability


def _reached(fate: np.ndarray, rows: np.ndarray, how_far: Fate) -> None:
    np.maximum(fate, rows * np.int8(how_far), out=fate)


def _nearest(ratios: np.ndarray, keys: list[float]) -> np.ndarray:
    """The position of the nearest key; the first one wins a tie."""
    order = np.argsort(keys)
    ascending = np.array(keys)[order]
    above = np.clip(np.searchsorted(ascending, ratios), 1, len(keys) - 1)
    low, high = order[above - 1], order[above]
    to_low, to_high = np.abs(ratios - ascending[above - 1]), np.abs(ratios - ascending[above])
    return np.where((to_low < to_high) | ((to_low == to_high) & (low < high)), low, high)


def _whole_numbers(column: Column) -> np.ndarray:
    """int64 [N]; 0 for what is missing, and numbers cut to whole ones."""
    values = np.asarray(column)
    if values.dtype.kind not in "iu":
        values = np.nan_to_num(values.astype(float), nan=0, posinf=0, neginf=0)
    return np.clip(values, 0, 2**30).astype(np.int64)


def _entry(resolution: str, num_frames: int, value: Any) -> Entry:
    where = f"bucket_config: {resolution}, {num_frames!r} frames"
    if type(num_frames) is not int or num_frames < 1:
        raise ConfigError(f"{where}: the number of frames must be a whole number from 1")
    if not isinstance(value, tuple) or len(value) != 2:
        raise ConfigError(f"{where}: write (keep probability, batch size); it is {value!r}")
    keep, batch_size = value
    if isinstance(keep, tuple) and num_frames == 1:
        raise ConfigError(f"{where}: an image has one keep probability; it is {keep!r}")
    pair = keep if isinstance(keep, tuple) else (keep, 1.0)
    if len(pair) != 2 or not all(type(part) in (int, float) and part >= 0 for part in pair):
        raise ConfigError(f"{where}: the keep probability must be a number from 0 to 1, or two; it is {keep!r}")
    if batch_size is None and pair[0] * pair[1] == 0:
        return Entry(resolution, num_frames, *pair, None)
    if type(batch_size) is not int or batch_size < 1:
        raise ConfigError(f"{where}: the batch size must be a whole number from 1; it is {batch_size!r}")
    return Entry(resolution, num_frames, *pair, batch_size)
