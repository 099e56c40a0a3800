"""The HTML of a report. Every text of a table is escaped here, and nothing is loaded or run by the page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from opensora.curation.analysis.figures import Figures
from opensora.curation.analysis.series import Bar
from opensora.curation.tables.stream import Cell, number_of, text_of
from opensora.errors import printable

MAX_TEXT = 300  # characters of a cell
MAX_CELLS = 12  # of an example
MAX_HISTOGRAMS = 60
LABEL, BAR, NUMBER, LINE = 200, 220, 60, 18  # pixels of a histogram: label, widest bar, number, height of a line
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 2em auto; max-width: 1200px;
  padding: 0 1em; }
h1 { font-size: 22px; }
h2 { font-size: 18px; margin-top: 2em; }
h3 { font-size: 14px; margin: 0 0 .3em; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .2em 1em .2em 0; border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; }
.grid { display: flex; flex-wrap: wrap; gap: 1.2em; }
figure { margin: 0; width: 200px; overflow-wrap: anywhere; }
figure img, .missing { width: 192px; height: 108px; object-fit: contain; background: #eee; display: block; }
.missing { line-height: 108px; text-align: center; color: #555; }
figcaption { font-size: 12px; }
svg { display: block; }
svg text { font-size: 12px; fill: #222; }
.all { fill: #adb5bd; }
.kept { fill: #2b6cb0; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'sha256-{}'"


class Example(NamedTuple):
    """A row, and a picture of it as a `data:` URL."""

    row: Mapping[str, Cell]
    picture: str | None


class Section(NamedTuple):
    """Rows with a common fate: the rule that drops them, their number, examples."""

    title: str
    total: int
    examples: Sequence[Example]


def page(figures: Figures, kept_figures: Figures | None, dropped: Sequence[Section], kept: Section) -> str:
    """The page: counts, rules, distributions of all rows and of those kept, examples of each group."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    title = f"Report of {shown(figures.source)}"
    examples = [_examples(f"dropped by {section.title}", section) for section in dropped if section.total]
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY.format(digest)}">',
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>",
        f"<h1>{title}</h1>", _counts(figures), _rules(figures, dropped, kept), _columns(figures),
        _histograms(figures, kept_figures), *examples, _examples("kept" if dropped else "examples", kept),
        "</main></body></html>", "",
    ])  # fmt: skip


def shown(cell: object) -> str:
    """A text of a table as HTML: cut, control and direction characters escaped, markup escaped."""
    text = printable(cell)
    return escape(text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}...")


def _counts(figures: Figures) -> str:
    hours = f", {figures.seconds.total / 3600:,.2f} hours" if figures.seconds.count else ""
    return f"<p>{figures.rows:,} rows{hours}</p>"


def _rules(figures: Figures, dropped: Sequence[Section], kept: Section) -> str:
    if not dropped:
        return ""
    rows = [(f"dropped by {section.title}", section.total) for section in dropped] + [("kept", kept.total)]
    lines = [
        f'<tr><td>{shown(name)}</td><td class="number">{count:,}</td>'
        f'<td class="number">{count / max(figures.rows, 1):.1%}</td></tr>'
        for name, count in rows
    ]
    head = '<tr><th>rule</th><th class="number">rows</th><th class="number">share</th></tr>'
    text = "A row is dropped by the first rule that does not hold."
    return f"<h2>Rules</h2><p>{text}</p><table>{head}{''.join(lines)}</table>"


def _columns(figures: Figures) -> str:
    """A line for each column: numbers, other texts, empty cells, range."""
    lines = []
    for column in figures.columns:
        series = column.numbers
        values = (series.least, series.quantiles(0.5)[0], series.most) if series.count else ()
        cells = [f"{series.count:,}", f"{column.texts.count:,}", f"{column.missing:,}", *(f"{v:.5g}" for v in values)]
        cells += [""] * (6 - len(cells))
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        lines.append(f"<tr><td>{shown(column.name)}</td>{numbers}</tr>")
    head = "".join(
        f'<th class="number">{name}</th>' for name in ("numbers", "texts", "empty", "least", "median", "most")
    )
    return f"<h2>Columns</h2><table><tr><th>column</th>{head}</tr>{''.join(lines)}</table>"


def _histograms(figures: Figures, kept: Figures | None) -> str:
    of_kept = dict(kept.histograms()) if kept else {}
    found = figures.histograms()
    parts = []
    for title, bars in found[:MAX_HISTOGRAMS]:
        parts.append(f"<div><h3>{shown(title)}</h3>{_svg(bars, 'all' if kept else 'kept')}</div>")
        if kept:
            drawn = _svg(of_kept[title], "kept") if title in of_kept else "<p>mostly different, or none</p>"
            parts.append(f"<div><h3>{shown(title)}, kept rows</h3>{drawn}</div>")
    more = f"<p>{len(found) - MAX_HISTOGRAMS:,} more columns are not drawn.</p>" if len(found) > MAX_HISTOGRAMS else ""
    return f'<h2>Distributions</h2><div class="grid">{"".join(parts)}</div>{more}'


def _svg(bars: Sequence[Bar], kind: str) -> str:
    most = max((bar.share for bar in bars), default=1)
    parts = [f'<svg width="{LABEL + BAR + NUMBER}" height="{LINE * len(bars)}" role="img" aria-label="histogram">']
    for number, bar in enumerate(bars):
        top, length = number * LINE, BAR * bar.share / most
        label = bar.label if len(bar.label) <= 28 else f"{bar.label[:26]}..."
        parts += [
            f'<text x="{LABEL - 6}" y="{top + 13}" text-anchor="end">{shown(label)}</text>',
            f'<rect class="{kind}" x="{LABEL}" y="{top + 2}" width="{length:.1f}" height="{LINE - 4}"/>',
            f'<text x="{LABEL + length + 5:.1f}" y="{top + 13}">{bar.share:.1%}</text>',
        ]
    return "".join([*parts, "</svg>"])


def _examples(title: str, section: Section) -> str:
    figures = [_example(example) for example in section.examples]
    return f'<h2>{shown(title)}: {section.total:,} rows</h2><div class="grid">{"".join(figures)}</div>'


def _example(example: Example) -> str:
    picture = (
        f'<img src="{example.picture}" alt="">' if example.picture else '<div class="missing">cannot be read</div>'
    )
    cells = [(name, text_of(cell)) for name, cell in example.row.items() if cell is not None and cell != ""]
    cells.sort(key=lambda cell: number_of(cell[1]) is not None)  # texts first
    lines = "<br>".join(f"{shown(name)}: {shown(text)}" for name, text in cells[:MAX_CELLS])
    return f"<figure>{picture}<figcaption>{lines}</figcaption></figure>"
