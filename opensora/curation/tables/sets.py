"""Rows compared with others: duplicates within a table, paths of another table."""

from __future__ import annotations

from opensora.curation.tables.context import Context
from opensora.curation.tables.reading import open_table
from opensora.curation.tables.scratch import KeySet
from opensora.curation.tables.stream import Row, TableStream, text_of
from opensora.errors import MediaError
from opensora.files import file_digest

MAX_BYTES = 2**44  # of a file that is hashed


def unique(table: TableStream, column: str, context: Context) -> TableStream:
    """The first row of each value in a column. Rows without a value stay."""
    place, seen = table.index(column), context.scratch.key_set()

    def keep(row: Row) -> bool:
        value = text_of(row[place])
        return not value or seen.add(value)

    return table.filtered(context.counted(f"duplicated {column}", keep))


def unique_content(table: TableStream, context: Context) -> TableStream:
    """The first row of each file content. Rows whose file cannot be read stay."""
    place, seen = table.index("path"), context.scratch.key_set()

    def keep(row: Row) -> bool:
        try:
            return seen.add(file_digest(text_of(row[place]), MAX_BYTES))
        except MediaError:
            return True

    return table.filtered(context.counted("duplicated content", keep))


def difference(table: TableStream, other: str, context: Context) -> TableStream:
    """The rows whose path is not in the table `other`."""
    place, paths = table.index("path"), _paths(other, context)
    return table.filtered(context.counted(f"in {other}", lambda row: text_of(row[place]) not in paths))


def intersection(table: TableStream, other: str, context: Context) -> TableStream:
    """The rows whose path is in the table `other`."""
    place, paths = table.index("path"), _paths(other, context)
    return table.filtered(context.counted(f"not in {other}", lambda row: text_of(row[place]) in paths))


def _paths(source: str, context: Context) -> KeySet:
    other, keys = open_table(source), context.scratch.key_set()
    place = other.index("path")
    keys.update(text_of(row[place]) for row in other.rows)
    return keys
