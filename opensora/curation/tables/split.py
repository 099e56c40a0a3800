"""A part of a table that fills buckets: the first rows of each."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

import numpy as np

from opensora.config.settings import TrainSettings
from opensora.curation.tables.reading import open_tables
from opensora.curation.tables.stream import TableStream, number_of
from opensora.curation.tables.writing import check_target, write_table
from opensora.datasets.bucket import Bucket, Buckets
from opensora.datasets.clip_columns import parse_crop
from opensora.errors import ConfigError

SIZES = ("num_frames", "height", "width")


def split_by_bucket(
    inputs: Sequence[str], target: str | Path, settings: TrainSettings, limit: int = 200, force: bool = False
) -> list[tuple[Bucket, int]]:
    """Writes up to `limit` rows of each bucket of a training configuration; returns the buckets and their numbers.

    Rows stay in order; a row has the bucket of the first epoch. Takes 25 bytes of memory a row. Raises ConfigError for
    a configuration without buckets, a table without num_frames, height or width, and if no row has a bucket.
    """
    if limit < 1:
        raise ConfigError(f"--limit {limit}: must be at least 1")
    if not settings.bucket_config:
        raise ConfigError("the configuration has no bucket_config; name one for training with buckets")
    check_target(Path(target), force)
    interval = (settings.dataset or {}).get("frame_interval", 1)
    sizes = _sizes(open_tables(inputs))
    assignment = Buckets(settings.bucket_config).assign(*sizes, seed=settings.seed, frame_interval=interval)
    buckets, _, rows, group = assignment.groups()
    if not buckets:
        raise ConfigError(f"{', '.join(inputs)[:200]}: no row has a bucket; see why with opensora buckets TABLE CONFIG")
    taken = _first_of_each(group, limit)
    kept = np.zeros(len(sizes[0]), bool)
    kept[rows[taken]] = True
    table = open_tables(inputs)
    write_table(TableStream(table.source, table.columns, compress(table.rows, kept.tobytes())), target, force)
    return list(zip(buckets, np.bincount(group[taken], minlength=len(buckets)).tolist(), strict=True))


def _sizes(table: TableStream) -> list[np.ndarray]:
    """num_frames, height and width of all rows or of their crops, each [N]; NaN where missing."""
    places = [table.index(name) for name in SIZES]
    cropped = table.columns.index("crop") if "crop" in table.columns else None
    columns = [array("d") for _ in SIZES]
    for row in table.rows:
        cells = [row[place] for place in places]
        if cropped is not None and (crop := parse_crop(row[cropped])):
            cells[1:] = crop.height, crop.width
        for column, cell in zip(columns, cells, strict=True):
            value = number_of(cell)
            column.append(np.nan if value is None else value)
    return [np.frombuffer(column) if column else np.zeros(0) for column in columns]


def _first_of_each(group: np.ndarray, limit: int) -> np.ndarray:
    """The indices of the first `limit` members of each group."""
    order = np.argsort(group, kind="stable")
    begin = np.searchsorted(group[order], group[order])  # where the group of each member begins
    return order[np.arange(len(order)) - begin < limit]
