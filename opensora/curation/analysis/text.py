"""Figures as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from opensora.curation.analysis.figures import Figures
from opensora.curation.analysis.series import Bar
from opensora.errors import printable

WIDTH = 40  # characters of a full bar
MAX_LABEL = 40
HEAD = ("column", "numbers", "missing", "least", "median", "mean", "most")


def describe(figures: Figures) -> str:
    """All figures: a line per column of numbers, then bars."""
    lines = [f"{figures.rows:,} rows"]
    if figures.seconds.count:
        hours = figures.seconds.total / 3600
        lines[0] += f", {hours:,.2f} hours in {figures.seconds.count:,} videos with num_frames and fps"
    lines += ["", *_aligned([HEAD, *_summaries(figures)]), *_missing(figures)]
    for title, bars in figures.histograms():
        lines += ["", printable(title)[:MAX_LABEL], *_bars(bars)]
    return "\n".join(lines)


def _summaries(figures: Figures) -> list[tuple[str, ...]]:
    missing = {column.name: column.missing + column.texts.count for column in figures.columns}
    rows = []
    for title, series in figures.numbers():
        values = (series.least, series.quantiles(0.5)[0], series.mean, series.most)
        lost = missing.get(title, figures.rows - series.count)
        rows.append((printable(title)[:MAX_LABEL], f"{series.count:,}", f"{lost:,}", *(f"{v:.5g}" for v in values)))
    return rows


def _missing(figures: Figures) -> list[str]:
    """A line for each other column with empty cells."""
    return [
        f"{printable(column.name)[:MAX_LABEL]}: {column.missing:,} of {figures.rows:,} cells are empty"
        for column in figures.columns
        if not column.is_number and column.missing
    ]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _bars(bars: Sequence[Bar]) -> list[str]:
    labels = [printable(bar.label).replace("\n", "\\n")[:MAX_LABEL] for bar in bars]
    width, most = max(map(len, labels), default=0), max((bar.share for bar in bars), default=1)
    return [
        f"  {label:>{width}}  {'#' * round(WIDTH * bar.share / most):{WIDTH}}  {bar.share:.1%}"
        for label, bar in zip(labels, bars, strict=True)
    ]
