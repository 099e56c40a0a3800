"""The order of rows, and parts of a table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice

from opensora.curation.tables.context import Context
from opensora.curation.tables.stream import Cell, Row, TableStream, number_of
from opensora.errors import ConfigError


def sort(table: TableStream, column: str, context: Context, descending: bool) -> TableStream:
    """Rows by the numbers, then the texts of a column; missing cells come last, equal ones stay in order."""
    place = table.index(column)
    keyed = ((_sort_key(row[place]), row) for row in table.rows)
    return TableStream(table.source, table.columns, context.scratch.in_order(keyed, descending))


def _sort_key(cell: Cell) -> Cell:
    number = number_of(cell)
    return cell if number is None else number


def shuffle(table: TableStream, context: Context) -> TableStream:
    """Rows in an order that depends on the seed and on their number only."""
    prefix = f"{context.seed}:"

    def keyed() -> Iterator[tuple[Cell, Row]]:
        for number, row in enumerate(table.rows):
            digest = hashlib.blake2b(f"{prefix}{number}".encode(), digest_size=7).digest()
            yield int.from_bytes(digest, "big"), row

    return TableStream(table.source, table.columns, context.scratch.in_order(keyed()))


def head(table: TableStream, count: int) -> TableStream:
    """The first `count` rows."""
    if count < 1:
        raise ConfigError(f"--head {count}: must be at least 1")
    return TableStream(table.source, table.columns, islice(table.rows, count))


def shards(table: TableStream, count: int, context: Context) -> Iterator[TableStream]:
    """`count` tables of consecutive rows whose lengths differ by at most one; each is read before the next.

    Raises ConfigError for fewer rows than shards.
    """
    if count < 1:
        raise ConfigError(f"--shard {count}: must be at least 1")
    total = 0

    def keyed() -> Iterator[tuple[Cell, Row]]:
        nonlocal total
        for row in table.rows:
            yield total, row
            total += 1

    rows = context.scratch.in_order(keyed())
    first = next(rows, None)
    if total < count:
        raise ConfigError(f"{table.source}: has {total} rows, fewer than {count} shards; use a smaller --shard")
    assert first is not None
    for number in range(count):
        length = total // count + (number < total % count)
        begin = [] if number else [first]
        yield TableStream(table.source, table.columns, [*begin, *islice(rows, length - len(begin))])
