"""Writes a table as WebDataset tars, the media included."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePath
from typing import IO

from opensora.curation.convert.new_folder import new_folder
from opensora.curation.tables.stream import Cell, Row, TableStream, text_of
from opensora.datasets.folder_table import SUFFIXES
from opensora.errors import ConfigError
from opensora.files import error_message, open_regular


def write_tars(table: TableStream, folder: str | Path, rows_per_tar: int = 1000) -> tuple[int, int]:
    """Writes `00000.tar`, ... into a new folder; returns the numbers of rows and of tars.

    A row is `KEY.mp4` (or its suffix), `KEY.txt` with the caption, and `KEY.json` with its other cells but the path;
    the keys are the numbers of the rows. Equal tables make equal bytes. Raises ConfigError for a missing file, one that
    is no video or image by its suffix, a table without rows and an existing folder; then nothing is written.
    """
    if rows_per_tar < 1:
        raise ConfigError(f"--rows-per-tar {rows_per_tar}: must be at least 1")
    place = table.index("path")
    count = tars = 0
    rows = iter(table.rows)
    with new_folder(folder) as temporary:
        while part := list(islice(rows, rows_per_tar)):
            with tarfile.open(temporary / f"{tars:05}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
                for row in part:
                    _add_row(tar, f"{count:09}", text_of(row[place]), table, row)
                    count += 1
            tars += 1
        if not count:
            raise ConfigError(f"{table.source}: has no rows; nothing is written")
    return count, tars


def _add_row(tar: tarfile.TarFile, key: str, path: str, table: TableStream, row: Row) -> None:
    suffix = PurePath(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{table.source}: '{path[:80]}' is no video or image by its suffix; remove the row")
    try:
        with open_regular(path, ConfigError) as media:
            _add(tar, key + suffix, media, os.fstat(media.fileno()).st_size)
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({error_message(error)})"
        raise ConfigError(f"{table.source}: '{path[:80]}' {reason}; remove such rows with data edit --ext") from error
    for name, content in _texts(table, row):
        _add(tar, key + name, io.BytesIO(content), len(content))


def _texts(table: TableStream, row: Row) -> Iterator[tuple[str, bytes]]:
    """(suffix, content) of the caption, and of the other cells as JSON."""
    known = {table.index("path")}
    if "text" in table.columns:
        caption = table.index("text")
        known.add(caption)
        if text := text_of(row[caption]):
            yield ".txt", text.encode("utf-8", "replace")
    cells: dict[str, Cell] = {
        name: cell for n, (name, cell) in enumerate(zip(table.columns, row, strict=True)) if n not in known
    }
    present = {name: cell for name, cell in cells.items() if cell is not None and cell != ""}
    if present:
        yield ".json", json.dumps(present).encode()


def _add(tar: tarfile.TarFile, name: str, file: IO[bytes], size: int) -> None:
    member = tarfile.TarInfo(name)  # no owner, time 0
    member.size = size
    tar.addfile(member, file)
