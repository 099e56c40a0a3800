"""Rows compared with others: duplicates within a table, clips of another table.

A clip is a path and, if the columns are there, a part of that file: rows of one source are different clips.
"""

from __future__ import annotations

from collections.abc import Callable

from opensora.curation.tables.clip_keys import clip_key, clip_keys, part_key
from opensora.curation.tables.context import Context
from opensora.curation.tables.reading import open_table
from opensora.curation.tables.stream import Row, TableStream, text_of
from opensora.errors import MediaError
from opensora.files import file_digest

MAX_BYTES = 2**44  # of a file that is hashed


def unique(table: TableStream, column: str, context: Context) -> TableStream:
    """The first row of each value in a column, of `path` of each clip. Rows without a value stay."""
    place, seen = table.index(column), context.scratch.key_set()
    key = clip_key(table) if column == "path" else lambda row: text_of(row[place])

    def keep(row: Row) -> bool:
        return not text_of(row[place]) or seen.add(key(row))

    return table.filtered(context.counted(f"duplicated {column}", keep))


def unique_content(table: TableStream, context: Context) -> TableStream:
    """The first row of each part of each file content. Rows whose file cannot be read stay."""
    place, part, seen = table.index("path"), part_key(table), context.scratch.key_set()

    def keep(row: Row) -> bool:
        try:
            return seen.add(file_digest(text_of(row[place]), MAX_BYTES) + part(row))
        except MediaError:
            return True

    return table.filtered(context.counted("duplicated content", keep))


def difference(table: TableStream, other: str, context: Context) -> TableStream:
    """The rows whose clip is not in the table `other`; its paths count if it has no parts of files."""
    known = _clips_in(table, other, context)
    return table.filtered(context.counted(f"in {other}", lambda row: not known(row)))


def intersection(table: TableStream, other: str, context: Context) -> TableStream:
    """The rows whose clip is in the table `other`; its paths count if it has no parts of files."""
    return table.filtered(context.counted(f"not in {other}", _clips_in(table, other, context)))


def _clips_in(table: TableStream, source: str, context: Context) -> Callable[[Row], bool]:
    other, keys = open_table(source), context.scratch.key_set()
    own, theirs = clip_keys(table, other)
    keys.update(map(theirs, other.rows))
    return lambda row: own(row) in keys
