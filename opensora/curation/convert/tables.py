"""Tables with other names of columns."""

from __future__ import annotations

import os
from pathlib import PurePath, PurePosixPath

from opensora.curation.convert.folders import split_folder
from opensora.curation.convert.request import ConvertRequest
from opensora.curation.tables.reading import open_table
from opensora.curation.tables.stream import Cell, Row, TableStream, text_of
from opensora.datasets.columns import SPELLINGS, shortened
from opensora.errors import ConfigError


def renamed(request: ConvertRequest) -> TableStream:
    """A table with the columns `path` and `text` in place of their other spellings, the others after them.

    A row may have its path in any of several columns, such as video_path and image_path. Relative paths are below the
    folder of the table.
    """
    table = open_table(request.root)
    return _standard(table, os.path.dirname(table.source), inside=False)


def hugging_face(request: ConvertRequest) -> TableStream:
    """The metadata of a folder. Raises ConfigError for a file_name that leaves the folder."""
    base = split_folder(request, None)
    return _standard(open_table(base), str(base), inside=True)


def _standard(table: TableStream, folder: str, inside: bool) -> TableStream:
    paths, texts = _places(table, "path"), _places(table, "text")
    if not paths:
        table.index("path")  # raises ConfigError
    others = [place for place in range(len(table.columns)) if place not in (*paths, *texts)]
    columns = ("path", *(["text"] if texts else []), *(table.columns[place] for place in others))

    def row(cells: Row) -> Row:
        path = text_of(_first(cells, paths, table))
        if inside and not _stays_inside(path):
            raise ConfigError(f"{table.source}: file_name '{shortened(path)}' leaves the folder; correct it")
        captions: list[Cell] = [_first(cells, texts, table)] if texts else []
        return [os.path.join(folder, path) if path else None, *captions, *(cells[place] for place in others)]

    return TableStream(table.source, columns, map(row, table.rows))


def _places(table: TableStream, column: str) -> list[int]:
    return [place for place, name in enumerate(table.columns) if name.lower() in SPELLINGS[column]]


def _first(cells: Row, places: list[int], table: TableStream) -> Cell:
    """The only cell among these that is not empty. Raises ConfigError for several different ones."""
    found = list(dict.fromkeys(text_of(cells[place]) for place in places if text_of(cells[place]).strip()))
    if len(found) > 1:
        names = ", ".join(table.columns[place] for place in places)
        raise ConfigError(f"{table.source}: a row has different values in {names}; remove all but one of the columns")
    return found[0] if found else None


def _stays_inside(name: str) -> bool:
    """Whether a relative path stays below its folder."""
    path = PurePath(name)
    return "\0" not in name and not path.is_absolute() and ".." not in (*path.parts, *PurePosixPath(name).parts)
