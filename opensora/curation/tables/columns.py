"""Columns selected, removed and renamed."""

from __future__ import annotations

from collections.abc import Sequence

from opensora.curation.tables.stream import TableStream
from opensora.errors import ConfigError

# What training reads: files, captions, sizes for buckets, spans of clips.
TRAINING = ("path", "text", "num_frames", "width", "height", "fps", "start_pts", "end_pts", "time_base", "crop")


def select(table: TableStream, names: Sequence[str]) -> TableStream:
    """These columns in this order."""
    places = [table.index(name) for name in names]
    rows = ([row[place] for place in places] for row in table.rows)
    return TableStream(table.source, tuple(table.columns[place] for place in places), rows)


def drop(table: TableStream, names: Sequence[str]) -> TableStream:
    """All columns but these."""
    gone = {table.columns[table.index(name)] for name in names}
    left = [column for column in table.columns if column not in gone]
    if not left:
        raise ConfigError(f"{table.source}: --drop leaves no column; keep one")
    return select(table, left)


def rename(table: TableStream, pairs: Sequence[str]) -> TableStream:
    """Columns under other names, `old=new`."""
    columns = list(table.columns)
    for pair in pairs:
        old, equals, new = pair.partition("=")
        if not (equals and new):
            raise ConfigError(f"--rename {pair!r}: write it as old=new")
        if new in columns:
            raise ConfigError(f"--rename {pair!r}: {table.source} has a column '{new}' already; drop it first")
        columns[table.index(old)] = new
    return TableStream(table.source, tuple(columns), table.rows)


def for_training(table: TableStream) -> TableStream:
    """The columns that training reads."""
    kept = {table.columns[table.index(name)] for name in ("path", "text") if _has(table, name)}
    return select(table, [column for column in table.columns if column in kept or column in TRAINING])


def _has(table: TableStream, name: str) -> bool:
    try:
        table.index(name)
    except ConfigError:
        return False
    return True
