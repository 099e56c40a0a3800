"""Near duplicates by the column phash: a banded index on disk, and one row that is kept of each group."""

from __future__ import annotations

import marshal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from opensora.curation.tables.context import Context
from opensora.curation.tables.stream import Row, TableStream, number_of, text_of

COLUMN = "duplicate_of"
BAND_BITS = 16  # of the four parts of a hash; clips that have no part in common are not compared
MAX_HASHES = 256  # of a row
MAX_IN_BAND = 256  # kept rows that one part of a hash leads to, the first ones
MAX_CANDIDATES = 32  # kept rows that a row is compared with, those with the most parts in common
MAX_OFFSET = 8  # hashes by which clips may be shifted: two seconds
MIN_OVERLAP = 0.5  # of the longer clip
MAX_DISTANCE = 12.0  # bits of 64 in which hashes differ, in the mean; those of unrelated pictures differ in 32
BIT_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


class Hashes(NamedTuple):
    """The hashes of a clip in order of time, uint8 [n, 8], and which of the n pictures have one, bool [n]."""

    bits: np.ndarray
    known: np.ndarray


def mark(table: TableStream, context: Context) -> TableStream:
    """The table with the column `duplicate_of`: the clip that a row repeats, `path` or `path[start, end)`, or empty.

    Clips are taken by pixels, then frames, then content, the largest first: each is kept, or is a duplicate of the
    nearest clip kept before. The order of the rows does not matter. Raises ConfigError without the column phash.
    """
    place, rank, name = table.index("phash"), _rank(table), _name(table)
    places = [at for at, column in enumerate(table.columns) if column != COLUMN]

    def rows() -> Iterator[Row]:
        store = _Store(context)
        store.add((*rank(row), name(row), read_hashes(text_of(row[place])), row) for row in table.rows)
        store.group()
        for row, kept in store.marked():
            yield [*(row[at] for at in places), kept]

    return TableStream(table.source, (*(table.columns[at] for at in places), COLUMN), rows())


def remove(table: TableStream, context: Context) -> TableStream:
    """The rows that repeat no other row, as `mark` says."""
    marked = mark(table, context)
    kept = marked.filtered(context.counted("near duplicates", lambda row: row[-1] is None))
    return TableStream(kept.source, kept.columns[:-1], (row[:-1] for row in kept.rows))


def read_hashes(text: str) -> Hashes:
    """The hashes of a cell. Words that are no hash, such as `-`, count as pictures without one."""
    words = text[: 17 * MAX_HASHES].split()[:MAX_HASHES]
    bits, known = np.zeros((len(words), 8), np.uint8), np.zeros(len(words), bool)
    for number, word in enumerate(words):
        if len(word) == 16 and set(word) <= set("0123456789abcdef"):
            bits[number], known[number] = np.frombuffer(bytes.fromhex(word), np.uint8), True
    return Hashes(bits, known)


def distance(one: Hashes, other: Hashes) -> float:
    """The mean distance of hashes in bits where two clips overlap, at the best offset; 64 if they do not."""
    lengths = len(one.known), len(other.known)
    if not all(lengths) or min(lengths) < MIN_OVERLAP * max(lengths):
        return 64.0
    bits = BIT_COUNTS[one.bits[:, None] ^ other.bits].sum(-1, dtype=np.int64)
    both = one.known[:, None] & other.known
    best = 64.0
    for offset in range(-MAX_OFFSET, MAX_OFFSET + 1):
        pairs = both.diagonal(offset)
        if len(pairs) >= MIN_OVERLAP * max(lengths) and pairs.sum() >= MIN_OVERLAP * len(pairs):
            best = min(best, float(bits.diagonal(offset)[pairs].mean()))
    return best


def parts(hashes: Hashes) -> list[int]:
    """The distinct parts of hashes, each with its position in a number."""
    numbers = np.ascontiguousarray(hashes.bits[hashes.known]).view(">u2").astype(np.int64)
    return np.unique(numbers + (np.arange(numbers.shape[1]) << BAND_BITS)).tolist()


def _rank(table: TableStream) -> Callable[[Row], tuple[float, float, str]]:
    """Pixels, frames and content of a row, by which the one that is kept is chosen; 0 where a column is missing."""

    def places(*names: str) -> list[int]:
        return [table.columns.index(name) for name in names if name in table.columns]

    sides, frames, content = places("height", "width"), places("num_frames"), places("source_hash")

    def rank(row: Row) -> tuple[float, float, str]:
        pixels = [number_of(row[place]) or 0 for place in sides] if len(sides) == 2 else [0.0]
        length = sum(number_of(row[place]) or 0 for place in frames)
        return float(np.prod(pixels)), float(length), "".join(text_of(row[place]) for place in content)

    return rank


def _name(table: TableStream) -> Callable[[Row], str]:
    """The name of a row's clip: `path`, or `path[start, end)`."""
    path = table.index("path")
    ends = [table.columns.index(name) for name in ("start_pts", "end_pts") if name in table.columns]

    def name(row: Row) -> str:
        span = [text_of(row[place]) for place in ends]
        return text_of(row[path]) + (f"[{span[0]}, {span[1] or 'end'})" if len(span) == 2 and span[0] else "")

    return name


class _Store:
    """Rows in a temporary SQLite file, and the index of those that are kept."""

    def __init__(self, context: Context) -> None:
        self.connection = context.scratch.connection
        number = context.scratch.new_number()
        self.rows, self.order, self.parts, self.found = (
            f"near_{name}{number}" for name in ("rows", "order", "parts", "found")
        )
        self.connection.execute(
            f"CREATE TABLE {self.rows} (id INTEGER PRIMARY KEY, pixels REAL, frames REAL, content BLOB, name BLOB, "
            "hashes BLOB, cells BLOB)"
        )
        self.connection.execute(
            f"CREATE TABLE {self.parts} (part INTEGER, rank INTEGER, PRIMARY KEY (part, rank)) WITHOUT ROWID"
        )
        self.connection.execute(f"CREATE TABLE {self.found} (id INTEGER PRIMARY KEY, kept INTEGER)")

    def add(self, rows: Iterable[tuple[float, float, str, str, Hashes, Row]]) -> None:
        """Takes (pixels, frames, content, name, hashes, cells)."""
        insert = f"INSERT INTO {self.rows} (pixels, frames, content, name, hashes, cells) VALUES (?, ?, ?, ?, ?, ?)"
        self.connection.executemany(
            insert,
            (
                (pixels, frames, _storable(content), _storable(name), _packed(hashes), marshal.dumps(cells))
                for pixels, frames, content, name, hashes, cells in rows
            ),
        )
        self.connection.execute(
            f"CREATE TABLE {self.order} AS SELECT id FROM {self.rows} ORDER BY pixels DESC, frames DESC, content, name"
        )

    def group(self) -> None:
        """Finds the kept row that each row repeats, the largest rows first."""
        query = f"SELECT o.rowid, o.id, r.hashes FROM {self.order} o JOIN {self.rows} r ON r.id = o.id ORDER BY o.rowid"
        for rank, row_id, packed in self.connection.execute(query):
            hashes = _unpacked(packed)
            own = parts(hashes)
            kept = self._nearest(hashes, own)
            if kept is None:
                self.connection.executemany(f"INSERT INTO {self.parts} VALUES (?, ?)", ((part, rank) for part in own))
            else:
                self.connection.execute(f"INSERT INTO {self.found} VALUES (?, ?)", (row_id, kept))

    def _nearest(self, hashes: Hashes, own: Sequence[int]) -> int | None:
        """The id of the nearest kept row that is near enough; the first of equal ones."""
        common: Counter[int] = Counter()
        for part in own:
            query = f"SELECT rank FROM {self.parts} WHERE part = ? ORDER BY rank LIMIT {MAX_IN_BAND}"
            common.update(rank for (rank,) in self.connection.execute(query, (part,)))
        best: tuple[float, int] | None = None
        for rank in sorted(common, key=lambda rank: (-common[rank], rank))[:MAX_CANDIDATES]:
            query = f"SELECT r.id, r.hashes FROM {self.order} o JOIN {self.rows} r ON r.id = o.id WHERE o.rowid = ?"
            row_id, packed = self.connection.execute(query, (rank,)).fetchone()
            far = distance(hashes, _unpacked(packed))
            if far <= MAX_DISTANCE and (best is None or far < best[0]):
                best = far, row_id
        return None if best is None else best[1]

    def marked(self) -> Iterator[tuple[Row, str | None]]:
        """The rows in the order given, each with the name of the kept row that it repeats."""
        query = (
            f"SELECT r.cells, k.name FROM {self.rows} r LEFT JOIN {self.found} f ON f.id = r.id "
            f"LEFT JOIN {self.rows} k ON k.id = f.kept ORDER BY r.id"
        )
        for cells, name in self.connection.execute(query):
            yield marshal.loads(cells), None if name is None else name.decode("utf-8", "surrogateescape")


def _storable(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _packed(hashes: Hashes) -> bytes:
    return hashes.known.tobytes() + hashes.bits.tobytes()


def _unpacked(data: bytes) -> Hashes:
    count = len(data) // 9
    bits = np.frombuffer(data, np.uint8, offset=count).reshape(count, 8)
    return Hashes(bits, np.frombuffer(data, bool, count))
