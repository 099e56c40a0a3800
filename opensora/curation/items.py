"""The items of a source: the media of a folder, or the rows of a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from opensora.curation.clip import Clip, Crop
from opensora.curation.tables.reading import open_table
from opensora.curation.tables.stream import Cell, number_of, text_of
from opensora.datasets.folder_table import caption_of, find_media
from opensora.datasets.video import Span
from opensora.errors import ConfigError, MediaError


def read_items(source: str) -> Iterator[Clip]:
    """The clips of a folder, sorted by path and with their captions, or of a table, in its order.

    Rows with start_pts are spans. Raises ConfigError for folders without media and invalid tables.
    """
    if Path(source).is_dir():
        for file in find_media(Path(source)):
            yield Clip(str(file), row={"path": str(file), "text": _caption(file)})
        return
    table = open_table(source)
    path = table.index("path")
    for row in table.rows:
        cells = dict(zip(table.columns, row, strict=True))
        yield Clip(text_of(row[path]), span_of(cells, source), crop_of(cells, source), cells)


def _caption(file: Path) -> str | None:
    """The caption in the .txt of a file."""
    if not file.with_suffix(".txt").is_file():
        return None
    try:
        return caption_of(file)
    except MediaError:
        return None


def span_of(row: dict[str, Cell], source: str) -> Span | None:
    """The span in the columns start_pts and end_pts. Raises ConfigError for other cells than integers."""
    start, end = _integer(row, "start_pts", source), _integer(row, "end_pts", source)
    if start is None:
        if end is not None:
            raise ConfigError(f"{source}: '{row.get('path')}' has an end_pts without a start_pts; give both")
        return None
    return Span(start, end)


def crop_of(row: dict[str, Cell], source: str) -> Crop | None:
    """The rectangle in the column crop, `top left height width`. Raises ConfigError for anything else."""
    text = text_of(row.get("crop")).split()
    if not text:
        return None
    if len(text) != 4 or not all(word.isdecimal() for word in text):
        raise ConfigError(f"{source}: crop '{' '.join(text)[:50]}' must be: top left height width, in pixels")
    return Crop(*(int(word[:9]) for word in text))


def _integer(row: dict[str, Cell], column: str, source: str) -> int | None:
    cell = row.get(column)
    if cell is None or cell == "":
        return None
    value = number_of(cell)
    if value is None or not value.is_integer():
        raise ConfigError(f"{source}: column '{column}': {str(cell)[:50]!r} is no integer; correct the cell")
    return int(value)
