"""Writes streams as CSV, JSON lines or Parquet: whole or not at all."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from opensora.curation.tables.stream import FLOATS, INTEGERS, Cell, Row, TableStream, number_of, text_of
from opensora.datasets.columns import shortened
from opensora.errors import ConfigError
from opensora.files import atomic_write

ROWS_PER_GROUP = 2**14


def write_table(table: TableStream, target: str | Path, force: bool = False) -> int:
    """Writes a table in the format that the suffix of `target` names; returns the number of rows.

    Known columns of numbers are numbers in Parquet and JSON lines, all others are texts. An existing file is replaced
    with `force` only. Raises ConfigError for an unknown suffix, an existing file and cells of the wrong type.
    """
    [count] = write_tables([table], [Path(target)], force)
    return count


def write_tables(tables: Iterable[TableStream], targets: Sequence[Path], force: bool = False) -> list[int]:
    """Writes several tables, one after the other: all of them or none. Returns the numbers of rows."""
    for target in targets:
        check_target(target, force)
    with atomic_write(*targets, make_folders=True, error=ConfigError) as temporaries:
        writers = [WRITERS[target.suffix.lower()] for target in targets]
        return [write(table, path) for write, table, path in zip(writers, tables, temporaries, strict=True)]


def check_target(target: Path, force: bool = False) -> None:
    """Raises ConfigError if a table cannot be written there: another suffix, or a file that is not to be replaced."""
    if target.suffix.lower() not in WRITERS:
        raise ConfigError(f"{target}: a table is a {', '.join(WRITERS)} file; name it so")
    if target.is_dir():
        raise ConfigError(f"{target}: is a folder; name a file")
    if target.exists() and not force:
        raise ConfigError(f"{target} exists; name another file, or replace it with --force")
    if target.suffix.lower() == ".parquet":
        _pyarrow(target)


def _write_csv(table: TableStream, path: Path) -> int:
    count = 0
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(table.columns)
        for count, row in enumerate(table.rows, start=1):  # noqa: B007  # the last count is the result
            writer.writerow(map(text_of, row))
    return count


def _write_jsonl(table: TableStream, path: Path) -> int:
    convert = [_converter(column) for column in table.columns]
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for count, row in enumerate(table.rows, start=1):
            cells = {
                name: function(cell, table.source, count)
                for name, function, cell in zip(table.columns, convert, row, strict=True)
            }
            try:
                file.write(json.dumps(cells, ensure_ascii=False) + "\n")
            except UnicodeEncodeError:
                raise _not_unicode(table, count, row) from None
    return count


def _write_parquet(table: TableStream, path: Path) -> int:
    pyarrow = _pyarrow(path)
    from pyarrow import parquet

    convert = [_converter(column) for column in table.columns]
    fields = [(column, _arrow_type(pyarrow, column)) for column in table.columns]
    schema, count = pyarrow.schema(fields), 0
    with parquet.ParquetWriter(path, schema) as writer:
        for rows in _groups(table.rows):
            cells = [
                [function(row[n], table.source, count + number) for number, row in enumerate(rows, start=1)]
                for n, function in enumerate(convert)
            ]
            try:
                arrays = [pyarrow.array(part, field.type) for part, field in zip(cells, schema, strict=True)]
            except UnicodeEncodeError:
                number, row = next((n, row) for n, row in enumerate(rows, start=1) if not _is_unicode(row))
                raise _not_unicode(table, count + number, row) from None
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
            count += len(rows)
    return count


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(f"{path}: Parquet needs pyarrow; pip install 'opensora[parquet]', or write CSV") from error
    return pyarrow


def _groups(rows: Any) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while group := list(islice(iterator, ROWS_PER_GROUP)):
        yield group


def _arrow_type(pyarrow: Any, column: str) -> Any:
    return pyarrow.int64() if column in INTEGERS else pyarrow.float64() if column in FLOATS else pyarrow.string()


def _converter(column: str) -> Callable[[Cell, str, int], Cell]:
    """The cell of a column as it is stored with a type."""
    if column not in INTEGERS | FLOATS:
        return lambda cell, source, row: None if cell is None else text_of(cell)

    def convert(cell: Cell, source: str, row: int) -> Cell:
        value = number_of(cell)
        if value is None:
            if cell is None or not str(cell).strip():
                return None
            shown = shortened(str(cell))
            raise ConfigError(f"{source}: row {row}, column '{column}': {shown!r} is no number; correct the cell")
        if column in FLOATS:
            return value
        if not value.is_integer():
            raise ConfigError(f"{source}: row {row}, column '{column}': {cell!r} is no integer; correct the cell")
        return int(value)

    return convert


def _is_unicode(row: Row) -> bool:
    try:
        "".join(map(text_of, row)).encode()
    except UnicodeEncodeError:
        return False
    return True


def _not_unicode(table: TableStream, number: int, row: Row) -> ConfigError:
    column = next(name for name, cell in zip(table.columns, row, strict=True) if not _is_unicode([cell]))
    return ConfigError(
        f"{table.source}: row {number}, column '{column}': is not UTF-8, which only .csv can hold; write CSV"
    )


WRITERS: dict[str, Callable[[TableStream, Path], int]] = {
    ".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet,
}  # fmt: skip
