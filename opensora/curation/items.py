"""The items of a source: the media of a folder, or the rows of a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from opensora.curation.clip import Clip
from opensora.curation.tables.reading import open_table
from opensora.curation.tables.stream import Cell, text_of
from opensora.datasets.clip_columns import parse_crop, parse_span
from opensora.datasets.folder_table import caption_of, find_media
from opensora.errors import ConfigError, MediaError


def read_items(source: str) -> Iterator[Clip]:
    """The clips of a folder, sorted by path and with their captions, or of a table, in its order.

    Rows may be parts of files. Raises ConfigError for folders without media and invalid tables.
    """
    if Path(source).is_dir():
        for file in find_media(Path(source)):
            yield Clip(str(file), row={"path": str(file), "text": _caption(file)})
        return
    table = open_table(source)
    path = table.index("path")
    for row in table.rows:
        cells = dict(zip(table.columns, row, strict=True))
        yield clip_of(cells, text_of(row[path]), source)


def _caption(file: Path) -> str | None:
    """The caption in the .txt of a file."""
    if not file.with_suffix(".txt").is_file():
        return None
    try:
        return caption_of(file)
    except MediaError:
        return None


def clip_of(row: dict[str, Cell], path: str, source: str) -> Clip:
    """The clip that the columns start_pts, end_pts and crop of a row describe. Raises ConfigError if they are wrong."""
    try:
        return Clip(path, parse_span(row.get("start_pts"), row.get("end_pts")), parse_crop(row.get("crop")), row)
    except ConfigError as error:
        raise ConfigError(f"{source}: {path!r}: {error}; correct the cell") from None
