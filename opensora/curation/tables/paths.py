"""The files that rows name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePath

from opensora.curation.tables.stream import Row, TableStream, text_of
from opensora.errors import ConfigError


def exists(table: TableStream) -> Callable[[Row], bool]:
    """Whether the file of a row exists."""
    place = table.index("path")
    return lambda row: _is_file(text_of(row[place]))


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a NUL character
        return False


def add_file_size(table: TableStream) -> TableStream:
    """With `filesize` in bytes; missing files have none."""
    place = table.index("path")

    def size(row: Row) -> list[int | None]:
        path = text_of(row[place])
        return [os.path.getsize(path) if _is_file(path) else None]

    return table.with_columns(("filesize",), size)


def make_relative(table: TableStream, folder: str) -> TableStream:
    """Paths below `folder` relative to it. Raises ConfigError for others."""
    place, base = table.index("path"), os.path.abspath(folder)

    def change(row: Row) -> Row:
        path = os.path.relpath(os.path.abspath(text_of(row[place])), base)
        if path.startswith(os.pardir):
            raise ConfigError(f"{table.source}: '{row[place]}' is not below {folder}; name a folder that holds all")
        return [*row[:place], path, *row[place + 1 :]]

    return table.mapped(change)


def make_absolute(table: TableStream, folder: str) -> TableStream:
    """Relative paths below `folder`, absolute ones as they are."""
    place, base = table.index("path"), os.path.abspath(folder)
    return table.mapped(lambda row: [*row[:place], os.path.join(base, text_of(row[place])), *row[place + 1 :]])


def add_id(table: TableStream) -> TableStream:
    """With `id`, the name of the file without folder and suffix."""
    place = table.index("path")
    return table.with_columns(("id",), lambda row: [PurePath(text_of(row[place])).stem])


def id_to_path(table: TableStream, folder: str | Path) -> TableStream:
    """With `path`, the media file below `folder` whose name without suffix is the column `id`; None if missing.

    Raises ConfigError where two files have one id.
    """
    from opensora.datasets.folder_table import find_media

    place = table.index("id")
    files: dict[str, Path] = {}
    for file in find_media(Path(folder)):
        if file.stem in files:
            raise ConfigError(f"{folder}: {files[file.stem]} and {file} have the same id; rename one")
        files[file.stem] = file
    return table.with_columns(("path",), lambda row: [_text_or_none(files.get(text_of(row[place])))])


def _text_or_none(path: Path | None) -> str | None:
    return None if path is None else str(path)
