"""The shards of a features folder: those a table needs, and whether existing ones are still up to date.

The plan is a function of (table, settings) alone: ranks divide it without communication, and an interrupted run resumes
with the missing shards. Rows appended to a table change only the last shards of a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from opensora.datasets.bucket import Bucket, Buckets, RowOutcome
from opensora.datasets.clip_columns import NONE
from opensora.datasets.feature_files import caption_key, open_shard, tensor_of
from opensora.datasets.file_content import content_key, file_stamps
from opensora.datasets.table import Table
from opensora.errors import ConfigError

FIXED = "fixed"  # resolution name of samples that are all resized to one size


class LatentShard(NamedTuple):
    """Rows of one crop and one size; `size` is (T, H, W), `batch_size` how many are encoded and trained together."""

    file: str
    crop: int
    bucket: Bucket
    size: tuple[int, int, int]
    batch_size: int
    rows: np.ndarray

    @property
    def num_pixels(self) -> int:
        """Pixels of all frames of all samples."""
        return len(self.rows) * int(np.prod(self.size))


class TextShard(NamedTuple):
    """Rows whose captions lie in one file."""

    file: str
    rows: np.ndarray


class Group(NamedTuple):
    """Rows [P], ascending, that are encoded at one size."""

    bucket: Bucket
    size: tuple[int, int, int]
    batch_size: int
    rows: np.ndarray


def fixed_group(rows: np.ndarray, size: tuple[int, int, int], batch_size: int) -> Group:
    """All rows at one size."""
    return Group(Bucket(FIXED, size[0], f"{size[1]}x{size[2]}"), size, batch_size, rows)


def bucket_groups(
    table: Table, rows: np.ndarray, config: dict, *, seed: int, crop: int, frame_interval: int
) -> tuple[list[Group], np.ndarray]:
    """The groups of rows that epoch `crop` of a training run would use, and all rows that any epoch may use."""
    placement = Buckets(config).assign(*table.sizes(), seed=seed, epoch=crop, frame_interval=frame_interval)
    buckets, batch_sizes, placed, group = placement.groups()
    chosen = np.isin(placed, rows)
    groups = [
        Group(bucket, bucket.size, int(batch_size), placed[chosen & (group == number)])
        for number, (bucket, batch_size) in enumerate(zip(buckets, batch_sizes, strict=True))
    ]
    possible = rows[placement.outcome[rows] >= RowOutcome.NOT_DRAWN]
    return [one for one in groups if len(one.rows)], possible


def latent_shards(groups: Sequence[Group], crop: int, most: Callable[[tuple[int, int, int]], int]) -> list[LatentShard]:
    """Shards of at most `most(size)` samples each, those of a group in the order of their rows."""
    shards = []
    for bucket, size, batch_size, rows in groups:
        folder = f"latents/crop{crop}/{bucket.resolution}_{bucket.num_frames}f_{bucket.ratio}"
        for part in _parts(rows, most(size)):
            name = f"{folder}/{part[0]:09d}-{part[-1]:09d}.safetensors"
            shards.append(LatentShard(name, crop, bucket, size, batch_size, part))
    return shards


def text_shards(rows: np.ndarray, most: int) -> list[TextShard]:
    """A shard for the chosen rows of every `most` rows of the table."""
    bins = rows // most
    return [
        TextShard(f"text/{number * most:09d}.safetensors", rows[bins == number]) for number in np.unique(bins).tolist()
    ]


def missing(
    folder: Path, shards: Sequence[LatentShard | TextShard], table: Table, replace_stale: bool,
    remedy: str = "encode these again with replace_stale=True, or name another --save-dir",
) -> list:  # fmt: skip
    """The shards to encode: missing ones, and stale ones with `replace_stale`.

    A shard is stale if its videos, captions or rows are no longer those of the table; a deleted video is no change.
    Raises ConfigError for stale shards without `replace_stale`.
    """
    stale: list[tuple[LatentShard | TextShard, str]] = []
    absent = []
    for shard in shards:
        reason = _why_stale(folder / shard.file, shard, table) if (folder / shard.file).is_file() else ""
        if reason is None:
            continue
        absent.append(shard)
        stale += [(shard, reason)] if reason else []
    if stale and not replace_stale:
        problem = f"{len(stale)} shards are stale, the first because {stale[0][1]}"
        raise ConfigError(f"{folder}: {problem}; {remedy}")
    return absent


def _why_stale(path: Path, shard: LatentShard | TextShard, table: Table) -> str | None:
    """What has changed since a shard was written: "" if rows were added, None if nothing has."""
    held = open_shard(path)
    keys = tensor_of(held, "key", path).numpy()
    if isinstance(shard, TextShard):
        return _why_text_is_stale(tensor_of(held, "row", path).numpy(), keys, shard.rows, table)
    planned, stamp = (tensor_of(held, name, path).numpy() for name in ("planned", "stamp"))
    if not np.array_equal(planned, shard.rows):
        return f"{shard.file} holds other rows than the table has now"
    if len(planned) and planned.max() >= len(table):
        return f"row {planned.max()} is no longer in the table"
    parts = table.parts_of(shard.rows)
    held_parts = tensor_of(held, "part", path).numpy() if "part" in held.keys() else np.full_like(parts, NONE)  # noqa: SIM118 (no dict)
    if not np.array_equal(parts, held_parts):
        return f"spans or crops of rows in {shard.file} have changed since it was encoded"
    paths = [table.file(int(row)) for row in shard.rows]
    stamps = file_stamps(paths)
    touched = (stamps != stamp).any(axis=1) & (stamps >= 0).all(axis=1)
    for number in np.flatnonzero(touched):
        if not np.array_equal(content_key(paths[number]), keys[number]):
            return f"{paths[number]} has changed since it was encoded"
    return None


def _why_text_is_stale(held: np.ndarray, keys: np.ndarray, wanted: np.ndarray, table: Table) -> str | None:
    assert table.text is not None
    for row, key in zip(held.tolist(), keys, strict=True):
        if row >= len(table) or not np.array_equal(caption_key(table.text[row]), key):
            return f"the caption of row {row} has changed since it was encoded"
    return None if np.isin(wanted, held).all() else ""


def _parts(rows: np.ndarray, most: int) -> Iterator[np.ndarray]:
    return (rows[start : start + most] for start in range(0, len(rows), most))
