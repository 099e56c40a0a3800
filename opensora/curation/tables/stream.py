"""A table as a stream: column names and rows that are read once, in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from opensora.datasets.columns import SPELLINGS, shortened
from opensora.errors import ConfigError, did_you_mean

Cell: TypeAlias = "str | int | float | None"  # None and "" are missing
Row: TypeAlias = "list[Cell]"

INTEGERS = frozenset((
    "num_frames", "width", "height", "resolution", "text_len", "num_tokens", "filesize", "start_pts", "end_pts",
    "scene",
))  # fmt: skip
FLOATS = frozenset(("aspect_ratio", "fps", "aes", "flow", "match", "ocr", "duration"))


@dataclass(frozen=True)
class TableStream:
    """Rows with one cell per column. `source` names the table in messages."""

    source: str
    columns: tuple[str, ...]
    rows: Iterable[Row]

    def index(self, column: str) -> int:
        """The position of a column. `path` and `text` have the other spellings of training tables.

        Raises ConfigError if there is none.
        """
        for name in SPELLINGS.get(column, (column,)):
            if name in self.columns:
                return self.columns.index(name)
        known = ", ".join(map(shortened, self.columns))[:300]
        raise ConfigError(
            f"{self.source}: has no column '{shortened(column)}'{did_you_mean(column, self.columns)}; it has {known}"
        )

    def mapped(self, change: Callable[[Row], Row]) -> TableStream:
        """The stream with each row replaced by `change(row)`."""
        return TableStream(self.source, self.columns, map(change, self.rows))

    def filtered(self, keep: Callable[[Row], bool]) -> TableStream:
        """The rows that `keep` accepts."""
        return TableStream(self.source, self.columns, filter(keep, self.rows))

    def with_columns(self, names: Sequence[str], cells: Callable[[Row], Sequence[Cell]]) -> TableStream:
        """The stream with columns added at the end, or replaced where they exist, by `cells(row)`."""
        columns = list(self.columns)
        columns += [name for name in names if name not in columns]
        places = [columns.index(name) for name in names]
        width = len(columns)

        def change(row: Row) -> Row:
            new = row + [None] * (width - len(row))
            for place, cell in zip(places, cells(row), strict=True):
                new[place] = cell
            return new

        return TableStream(self.source, tuple(columns), map(change, self.rows))


def number_of(cell: Cell) -> float | None:
    """A cell as a finite number, or None."""
    if not cell:
        return None if cell is None or cell == "" else 0.0
    try:
        value = float(cell)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def text_of(cell: Cell) -> str:
    """A cell as text; missing cells are empty, integral floats have no fraction."""
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53:
        return str(int(cell))
    return "" if cell is None else str(cell)
