"""Buckets: the resolution, number of frames and aspect ratio at which each row of a table is trained.

A configuration is `{resolution: {num_frames: (keep, batch_size)}}`. `keep` is the probability that a fitting row stays
at this resolution; with a tuple `(keep, keep_frames)`, `keep_frames` is drawn first: a row that fails it is cut to
fewer frames. All rows are assigned at once. Draws depend only on (seed, epoch, entry, row): epochs and entries are
independent, and rows appended to a table do not change earlier ones.
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
MOST_RATIOS = 64  # more than any resolution has
CHUNK = 2**18  # rows assigned together; fits into a CPU cache
DRAWS = 0  # id of this random stream; samplers.py and datasets.py use others


class RowOutcome(IntEnum):
    """Why a row has no bucket: the furthest check it passed in any entry."""

    UNKNOWN_SIZE = 0
    TOO_SMALL = 1
    NO_IMAGES = 2
    TOO_SHORT = 3
    KEEP_IS_ZERO = 4
    NOT_DRAWN = 5
    PLACED = 6


REASONS = {
    RowOutcome.UNKNOWN_SIZE: "num_frames, height or width is not known",
    RowOutcome.TOO_SMALL: "fewer pixels than 0.8 of the smallest resolution",
    RowOutcome.NO_IMAGES: "an image, and no resolution of its size has an entry for 1 frame",
    RowOutcome.TOO_SHORT: "fewer frames than any entry of its size needs",
    RowOutcome.KEEP_IS_ZERO: "kept out by a keep probability of 0",
    RowOutcome.NOT_DRAWN: "not drawn in this epoch (keep probability below 1)",
}


class Bucket(NamedTuple):
    """The bucket of a batch; `ratio` is a key of the resolution's table of sizes."""

    resolution: str
    num_frames: int
    ratio: str

    @property
    def size(self) -> tuple[int, int, int]:
        """(T, H, W) in frames and pixels."""
        return (self.num_frames, *SIZES[self.resolution][self.ratio])

    def __str__(self) -> str:
        return f"{self.resolution} {self.num_frames}f {self.ratio}"


class BucketEntry(NamedTuple):
    """One entry of the configuration; `batch_size` is None if no row can stay."""

    resolution: str
    num_frames: int
    keep: float
    keep_frames: float
    batch_size: int | None


class Buckets:
    """The validated entries of a bucket configuration, in the order in which they are tried.

    Resolutions with more pixels come first, then longer clips. Raises ConfigError for an invalid configuration.
    """

    def __init__(self, config: dict[str, dict[int, Any]]) -> None:
        tables: dict[str, list[BucketEntry]] = {}
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
        """The number of (resolution, frames, ratio) buckets."""
        return sum(len(SIZES[entry.resolution]) for entry in self.entries)

    def assign(
        self, num_frames: Column, height: Column, width: Column, *, seed: int, epoch: int = 0, frame_interval: int = 1
    ) -> BucketAssignment:
        """Assigns a bucket to every row, or the reason for none. Columns are [N]; cells <= 0 are unknown.

        A row fits a resolution if it has at least 0.8 of its pixels. An image takes the entry for 1 frame, a video the
        longest entry with `T >= num_frames * frame_interval`. A row that is not kept tries the next resolution.
        """
        columns = [np.asarray(column) for column in (num_frames, height, width)]
        count = len(columns[0])
        entry, ratio, outcome = np.empty(count, np.int16), np.empty(count, np.int16), np.empty(count, np.int8)
        for start in range(0, count, CHUNK):
            rows = slice(start, start + CHUNK)
            frames, heights, widths = (_whole_numbers(column[rows]) for column in columns)
            drawn_by = (int(seed), epoch, DRAWS)
            entry[rows], outcome[rows] = self._enter(frames, heights, widths, start, drawn_by, frame_interval)
            ratio[rows] = self._ratios(entry[rows], heights, widths)
        return BucketAssignment(self.entries, entry, ratio, outcome)

    def _enter(
        self, frames: np.ndarray, height: np.ndarray, width: np.ndarray, start: int, key: tuple[int, ...], interval: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(entry [N], outcome [N]) of the rows from `start` on."""
        known, pixels, image = (frames > 0) & (height > 0) & (width > 0), height * width, frames == 1
        entry = np.full(len(frames), -1, np.int16)
        outcome = np.where(known, RowOutcome.TOO_SMALL, RowOutcome.UNKNOWN_SIZE).astype(np.int8)
        for resolution, numbered in groupby(enumerate(self.entries), lambda pair: pair[1].resolution):
            inside = known & (entry < 0) & (5 * pixels >= 4 * NUM_PIXELS[resolution])
            _record(outcome, inside & image, RowOutcome.NO_IMAGES)
            _record(outcome, inside & ~image, RowOutcome.TOO_SHORT)
            for index, asked in numbered:
                fits = inside & (image if asked.num_frames == 1 else frames >= asked.num_frames * interval)
                never = asked.keep * asked.keep_frames == 0
                _record(outcome, fits, RowOutcome.KEEP_IS_ZERO if never else RowOutcome.NOT_DRAWN)
                fits &= _happens(asked.keep_frames, len(frames), start, *key, index, 0)
                kept = fits & _happens(asked.keep, len(frames), start, *key, index, 1)
                entry[kept], outcome[kept] = index, RowOutcome.PLACED
                inside &= ~fits
        return entry, outcome

    def _ratios(self, entry: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
        """The index of the nearest ratio in the table of each row's resolution, -1 for a row without an entry."""
        ratio = np.full(len(entry), -1, np.int16)
        for resolution in {asked.resolution for asked in self.entries}:
            own = [asked.resolution == resolution for asked in self.entries]
            rows = np.flatnonzero(np.array([*own, False])[entry])  # index -1 selects the appended False
            ratio[rows] = _nearest(height[rows] / width[rows], [float(key) for key in SIZES[resolution]])
        return ratio


@dataclass(frozen=True)
class BucketAssignment:
    """The buckets of a table's rows: indices `entry` and `ratio` [N], -1 for none, and `outcome`, a RowOutcome [N]."""

    entries: tuple[BucketEntry, ...]
    entry: np.ndarray
    ratio: np.ndarray
    outcome: np.ndarray

    def __getitem__(self, row: int) -> Bucket | None:
        code = int(self.entry[row]) * MOST_RATIOS + int(self.ratio[row])
        return None if code < 0 else self._bucket(code)

    def groups(self) -> tuple[list[Bucket], np.ndarray, np.ndarray, np.ndarray]:
        """(buckets [G] by first row, batch sizes [G], assigned rows [P] ascending, bucket index of each [P])."""
        rows = np.flatnonzero(self.entry >= 0)
        codes = self.entry[rows] * np.int32(MOST_RATIOS) + self.ratio[rows]
        first = np.full(len(self.entries) * MOST_RATIOS, len(rows))
        first[codes[::-1]] = np.arange(len(rows) - 1, -1, -1)  # the last write to an index wins
        found = np.argsort(first, kind="stable")[: np.count_nonzero(first < len(rows))]
        number = np.zeros(len(first), np.int16 if len(first) < 2**15 else np.int32)  # 16 bits sort fastest
        number[found] = np.arange(len(found))
        batch_sizes = [self.entries[code // MOST_RATIOS].batch_size for code in found]
        return [self._bucket(int(code)) for code in found], np.array(batch_sizes, np.int64), rows, number[codes]

    def _bucket(self, code: int) -> Bucket:
        asked = self.entries[code // MOST_RATIOS]
        return Bucket(asked.resolution, asked.num_frames, list(SIZES[asked.resolution])[code % MOST_RATIOS])


def random_words(count: int, seed: int, epoch: int, purpose: int, *key: int, start: int = 0) -> np.ndarray:
    """Random uint64 [count] from index `start` on, independent of `count` and of the NumPy version."""
    words = [seed % 2**32, (seed >> 32) % 2**32, epoch, purpose, *key]
    return np.random.PCG64(np.random.SeedSequence(words)).advance(start).random_raw(count)


def _happens(probability: float, count: int, start: int, *key: int) -> np.ndarray | bool:
    if probability <= 0 or probability >= 1:
        return probability >= 1
    return (random_words(count, *key, start=start) >> np.uint64(11)) * 2.0**-53 < probability


def _record(outcomes: np.ndarray, rows: np.ndarray, outcome: RowOutcome) -> None:
    np.maximum(outcomes, rows * np.int8(outcome), out=outcomes)


def _nearest(ratios: np.ndarray, keys: list[float]) -> np.ndarray:
    """The index of the nearest key; the first one wins a tie."""
    order = np.argsort(keys)
    ascending = np.array(keys)[order]
    above = np.clip(np.searchsorted(ascending, ratios), 1, len(keys) - 1)
    low, high = order[above - 1], order[above]
    to_low, to_high = np.abs(ratios - ascending[above - 1]), np.abs(ratios - ascending[above])
    return np.where((to_low < to_high) | ((to_low == to_high) & (low < high)), low, high)


def _whole_numbers(column: Column) -> np.ndarray:
    """int64 [N], truncated; 0 for missing values."""
    values = np.asarray(column)
    if values.dtype.kind not in "iu":
        values = np.nan_to_num(values.astype(float), nan=0, posinf=0, neginf=0)
    return np.clip(values, 0, 2**30).astype(np.int64)


def _entry(resolution: str, num_frames: int, value: Any) -> BucketEntry:
    where = f"bucket_config: {resolution}, {num_frames!r} frames"
    if type(num_frames) is not int or num_frames < 1:
        raise ConfigError(f"{where}: the number of frames must be an integer of at least 1")
    if not isinstance(value, tuple) or len(value) != 2:
        raise ConfigError(f"{where}: write (keep probability, batch size); it is {value!r}")
    keep, batch_size = value
    if isinstance(keep, tuple) and num_frames == 1:
        raise ConfigError(f"{where}: an image has one keep probability; it is {keep!r}")
    pair = keep if isinstance(keep, tuple) else (keep, 1.0)
    if len(pair) != 2 or not all(type(part) in (int, float) and part >= 0 for part in pair):
        raise ConfigError(f"{where}: the keep probability must be a number from 0 to 1, or two; it is {keep!r}")
    if batch_size is None and pair[0] * pair[1] == 0:
        return BucketEntry(resolution, num_frames, *pair, None)
    if type(batch_size) is not int or batch_size < 1:
        raise ConfigError(f"{where}: the batch size must be an integer from 1; it is {batch_size!r}")
    return BucketEntry(resolution, num_frames, *pair, batch_size)
