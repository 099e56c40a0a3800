"""The figures of a table: what each column holds, and how long it plays."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath

from opensora.curation.analysis.series import Bar, NumberSeries, TextSeries
from opensora.curation.tables.stream import Cell, Row, TableStream, number_of, text_of
from opensora.datasets.columns import SPELLINGS

MOSTLY = 0.9  # share of numbers among the cells of a column of numbers
UNSHOWN = frozenset(("start_pts", "end_pts", "id", "relpath"))  # say nothing about a distribution


@dataclass
class ColumnFigures:
    """The cells of a column: numbers, other texts, and how many are missing."""

    name: str
    numbers: NumberSeries = field(default_factory=NumberSeries)
    texts: TextSeries = field(default_factory=TextSeries)
    missing: int = 0

    def add(self, cell: Cell) -> None:
        number = number_of(cell)
        if number is not None:
            self.numbers.add(number)
        elif cell is None or not str(cell).strip():
            self.missing += 1
        else:
            self.texts.add(str(cell))

    @property
    def is_number(self) -> bool:
        return self.numbers.count > 0 and self.numbers.count >= MOSTLY * (self.numbers.count + self.texts.count)


class Figures:
    """The columns of a table with what follows from them: seconds, words of captions, kinds of files."""

    def __init__(self, table: TableStream) -> None:
        self.source, self.rows = table.source, 0
        shown = [place for place, name in enumerate(table.columns) if name not in UNSHOWN]
        self.columns = [ColumnFigures(table.columns[place]) for place in shown]
        self.seconds, self.words, self.kinds = NumberSeries(), NumberSeries(), TextSeries()
        self._places = shown
        self._path, self._text = (table.index(name) if _has(table, name) else None for name in ("path", "text"))
        self._length, self._rate = (
            table.columns.index(name) if name in table.columns else None for name in ("num_frames", "fps")
        )

    def add(self, row: Row) -> None:
        """Counts a row."""
        self.rows += 1
        for column, place in zip(self.columns, self._places, strict=True):
            column.add(row[place])
        if self._path is not None:
            self.kinds.add(PurePath(text_of(row[self._path])).suffix.lower() or "none")
        if self._text is not None and (caption := text_of(row[self._text]).strip()):
            self.words.add(len(caption.split()))
        if self._length is not None and self._rate is not None:
            frames, fps = number_of(row[self._length]), number_of(row[self._rate])
            if frames and fps and frames > 1 and fps > 0:
                self.seconds.add(frames / fps)

    def numbers(self) -> list[tuple[str, NumberSeries]]:
        """(title, series) of everything that is a number."""
        own = [(column.name, column.numbers) for column in self.columns if column.is_number]
        derived = [("seconds", self.seconds), ("words of the caption", self.words)]
        return own + [(title, series) for title, series in derived if series.count]

    def texts(self) -> list[tuple[str, TextSeries]]:
        """(title, series) of columns with few different texts."""
        own = [(column.name, column.texts) for column in self.columns if not column.is_number]
        return [(title, series) for title, series in [("kind of file", self.kinds), *own] if series.bars()]

    def histograms(self) -> list[tuple[str, list[Bar]]]:
        """(title, bars) of all columns that have some."""
        numbers = [(title, series.bars()) for title, series in self.numbers()]
        return [*numbers, *((title, series.bars()) for title, series in self.texts())]


def figures_of(table: TableStream) -> Figures:
    """The figures of a table, which is read once."""
    figures = Figures(table)
    for row in table.rows:
        figures.add(row)
    return figures


def _has(table: TableStream, name: str) -> bool:
    return any(spelling in table.columns for spelling in SPELLINGS[name])
