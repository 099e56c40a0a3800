"""Texts that tell the clips of tables apart: path, span and crop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from opensora.curation.tables.stream import Row, TableStream, number_of, text_of
from opensora.datasets.columns import CLIP, TIMES

Key: TypeAlias = Callable[[Row], str]


def part_key(table: TableStream) -> Key:
    """The span and crop of a row; empty for whole files."""
    places = {name: table.columns.index(name) for name in CLIP if name in table.columns}

    def key(row: Row) -> str:
        found = {name: number_of(row[place]) if name in TIMES else row[place] for name, place in places.items()}
        cells = [text_of(found.get(name)).strip() for name in CLIP]
        return "\0" + "\0".join(cells) if any(cells) else ""

    return key


def clip_key(table: TableStream) -> Key:
    """The path of a row with its span and crop."""
    place, part = table.index("path"), part_key(table)
    return lambda row: text_of(row[place]) + part(row)


def clip_keys(table: TableStream, other: TableStream) -> tuple[Key, Key]:
    """Keys that are equal for equal clips of two tables; for equal paths if `other` has no parts of files."""
    if set(CLIP) & set(other.columns):
        return clip_key(table), clip_key(other)
    here, there = table.index("path"), other.index("path")
    return lambda row: text_of(row[here]), lambda row: text_of(row[there])
