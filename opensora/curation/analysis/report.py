"""A report of a table: distributions, rows dropped by each rule, examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from opensora.curation.analysis.figures import Figures
from opensora.curation.analysis.page import Example, Section, page
from opensora.curation.analysis.thumbnails import thumbnail
from opensora.curation.tables.expression import condition
from opensora.curation.tables.reading import open_tables
from opensora.curation.tables.stream import Cell, Row, TableStream
from opensora.errors import ConfigError
from opensora.files import atomic_write

MAX_EXAMPLES = 50
MAX_RULES = 20


class EvenSample:
    """Up to `count` of the rows added, at equal distances."""

    def __init__(self, count: int) -> None:
        self.count, self._kept, self._added, self._stride = count, list[Row](), 0, 1

    def add(self, row: Row) -> None:
        if self._added % self._stride == 0:
            self._kept.append(row)
            if len(self._kept) > 2 * self.count:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
        self._added += 1

    @property
    def rows(self) -> list[Row]:
        length = len(self._kept)
        return self._kept if length <= self.count else [self._kept[n * length // self.count] for n in range(self.count)]


@dataclass
class Group:
    """Rows with a common fate: kept, or dropped by a rule."""

    title: str
    sample: EvenSample
    keep: Callable[[Row], bool] = lambda row: False
    count: int = 0

    def add(self, row: Row) -> None:
        self.count += 1
        self.sample.add(row)


class ReportSummary(NamedTuple):
    """Numbers of rows: all, and those that no rule drops."""

    rows: int
    kept: int


def write_report(
    inputs: Sequence[str], target: str | Path, conditions: Sequence[str] = (), examples: int = 6
) -> ReportSummary:
    """Writes the report of tables as one HTML file, which needs no other file and no network.

    conditions: rules as of `expression.condition`; a row is dropped by the first one that does not hold. Media are read
    for `examples` rows of each group. Raises ConfigError for invalid tables and conditions.
    """
    if not 0 <= examples <= MAX_EXAMPLES or len(conditions) > MAX_RULES:
        raise ConfigError(f"a report shows up to {MAX_EXAMPLES} examples a rule, and up to {MAX_RULES} rules")
    table = open_tables(inputs)
    rules = [Group(text, EvenSample(examples), condition(text, table)) for text in conditions]
    kept, figures = Group("kept", EvenSample(examples)), Figures(table)
    figures_of_kept = Figures(table)
    for row in table.rows:
        figures.add(row)
        failed = next((rule for rule in rules if not rule.keep(row)), kept)
        failed.add(row)
        if failed is kept:
            figures_of_kept.add(row)
    sections = [Section(group.title, group.count, _examples(group, table)) for group in (*rules, kept)]
    text = page(figures, figures_of_kept if rules else None, sections[:-1], sections[-1])
    with atomic_write(target, make_folders=True, error=ConfigError) as [temporary]:
        temporary.write_text(text, encoding="utf-8")
    return ReportSummary(figures.rows, kept.count)


def _examples(group: Group, table: TableStream) -> list[Example]:
    rows: list[dict[str, Cell]] = [dict(zip(table.columns, row, strict=True)) for row in group.sample.rows]
    return [Example(row, thumbnail(row, table)) for row in rows]
