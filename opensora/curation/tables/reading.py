"""Opens tables as streams: CSV, JSON lines, Parquet, alone or several as one."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from opensora.config.schema import MAX_TEXT
from opensora.curation.tables.stream import Cell, Row, TableStream
from opensora.datasets import parquet
from opensora.datasets.columns import Notes, shortened
from opensora.datasets.table_files import (
    CHUNK,
    CsvFile,
    csv_problem,
    even_cells,
    json_row,
    kinds,
    line_of,
    metadata_of,
    text_lines,
)
from opensora.errors import ConfigError
from opensora.files import error_message, open_regular

MAX_COLUMNS = 1000
PLAIN = frozenset((str, int, float, type(None)))


def open_tables(patterns: Sequence[str]) -> TableStream:
    """The rows of all tables that match the paths or glob `patterns`, one table after the other.

    Columns are the union of theirs in order of appearance; cells of columns that a table lacks are None. Raises
    ConfigError for a pattern that matches nothing and for invalid tables.
    """
    tables = [open_table(path) for path in _expanded(patterns)]
    if len(tables) == 1:
        return tables[0]
    columns = tuple(dict.fromkeys(column for table in tables for column in table.columns))
    return TableStream(
        ", ".join(patterns)[:200], columns, chain.from_iterable(_rearranged(table, columns) for table in tables)
    )


def _expanded(patterns: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise ConfigError(f"{pattern}: no such table; give .csv, .jsonl or .parquet files")
        found += matches
    return found


def _rearranged(table: TableStream, columns: Sequence[str]) -> Iterator[Row]:
    if tuple(columns) == table.columns:
        yield from table.rows
        return
    place = {column: n for n, column in enumerate(table.columns)}
    order = [place.get(column) for column in columns]
    for row in table.rows:
        yield [None if n is None else row[n] for n in order]


def open_table(path: str | Path) -> TableStream:
    """One table, or a folder with metadata.csv or metadata.jsonl. Its rows are read as they are asked for."""
    source = metadata_of(path) if os.path.isdir(path) else str(path)
    reader = READERS.get(Path(source).suffix.lower())
    if reader is None:
        raise ConfigError(f"{source}: a table is a {kinds()} file; convert it")
    try:
        columns, rows = reader(source)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read ({error_message(error)})") from error
    columns = tuple(column.strip() for column in columns)
    if not any(columns):
        raise ConfigError(f"{source}: has no header; name its columns in the first line")
    if len(columns) > MAX_COLUMNS:
        raise ConfigError(f"{source}: has {len(columns):,} columns, more than {MAX_COLUMNS:,}; is it a table?")
    doubled = next((column for column in columns if columns.count(column) > 1), None)
    if doubled is not None:
        shown = f"columns '{shortened(doubled)}'" if doubled else "columns without a name"
        raise ConfigError(f"{source}: has two {shown}; rename or remove one")
    return TableStream(source, columns, rows)


def _csv(source: str) -> tuple[tuple[str, ...], Iterator[Row]]:
    with CsvFile(source, any_columns=True) as table:
        columns = tuple(table.names)
    return columns, _csv_rows(source)


def _csv_rows(source: str) -> Iterator[Row]:
    notes, number = Notes(source), 0
    try:
        with CsvFile(source, any_columns=True) as table:
            width = len(table.names)
            counted = filter(table.counts, table.rows)
            while part := list(islice(counted, CHUNK)):
                part = even_cells(part, table, line_of(source, number, any_columns=True), notes)
                number += len(part)
                for row in part:
                    yield [*row, *("",) * (width - len(row))]
    except csv.Error as error:
        raise ConfigError(csv_problem(error, source, table)) from error
    notes.log()


def _jsonl(source: str) -> tuple[tuple[str, ...], Iterator[Row]]:
    columns: dict[str, None] = {}
    for row, where in _json_rows(source):
        for name in row.keys() - columns.keys():
            _check_text(name, f"{source}: {where}", name)
        columns.update(dict.fromkeys(row))
        if len(columns) > MAX_COLUMNS:
            raise ConfigError(f"{source}: its rows have more than {MAX_COLUMNS:,} different keys; write the same")
    names = tuple(columns)
    rows = (
        [_json_cell(row.get(name), f"{source}: {where}", name) for name in names] for row, where in _json_rows(source)
    )
    return names, rows


def _json_cells(source: str, names: Sequence[str]) -> Iterator[Row]:
    for row, where in _json_rows(source):
        yield [_json_cell(row.get(name), f"{source}: {where}", name) for name in names]


def _json_rows(source: str) -> Iterator[tuple[dict[str, Any], str]]:
    with open_regular(source, ConfigError) as file:
        for number, line in enumerate(text_lines(file, source), start=1):
            if line.strip():
                yield json_row(line, f"{source}: line {number}"), f"line {number}"


def _json_cell(value: Any, where: str, column: str) -> Cell:
    """A scalar as it is; lists and objects as JSON text."""
    if isinstance(value, bool):
        return str(value)
    cell: Cell = (
        value if value is None or isinstance(value, int | float | str) else json.dumps(value, ensure_ascii=False)
    )
    _check_text(cell, where, column)
    return cell


def _check_text(cell: Cell, where: str, column: str) -> None:
    """Raises ConfigError for a text that is too long, or holds surrogates that stand for no byte."""
    if not isinstance(cell, str):
        return
    shown = f"{where}, column '{shortened(column)}'"
    if len(cell) > MAX_TEXT:
        raise ConfigError(f"{shown}: holds {len(cell):,} characters, more than {MAX_TEXT:,}; shorten it")
    try:
        cell.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ConfigError(f"{shown}: holds half a surrogate pair, which is no text; correct it") from None


def _parquet(source: str) -> tuple[tuple[str, ...], Iterator[Row]]:
    with parquet.opened(source) as content:
        columns = tuple(content.schema_arrow.names)
    return columns, _parquet_rows(source)


def _parquet_rows(source: str) -> Iterator[Row]:
    first = 0
    with parquet.opened(source) as content:
        names = content.schema_arrow.names
        budget = parquet.budget(source)
        rows = parquet.check_sizes(content, names, budget, source)
        for batch in content.iter_batches(rows):
            if batch.nbytes > budget:
                raise parquet.too_large(source)
            cells = [array.to_pylist() for array in batch.columns]
            for n, row in enumerate(zip(*cells, strict=True)):
                yield [
                    cell
                    if type(cell) in (str, int, float, type(None))
                    else _parquet_cell(cell, source, first + n, name)
                    for cell, name in zip(row, names, strict=True)
                ]
            first += len(batch)


def _parquet_cell(cell: Any, source: str, row: int, column: str) -> Cell:
    """Values without a counterpart in CSV as text: bytes decoded, lists and structs as JSON, dates in ISO 8601."""
    if isinstance(cell, bytes):
        return cell.decode("utf-8", "surrogateescape")
    try:
        value: Cell = json.dumps(cell, ensure_ascii=False, default=str) if isinstance(cell, list | dict) else str(cell)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{source}: row {row}, column '{shortened(column)}': has no text ({error_message(error)}); remove it"
        ) from error
    _check_text(value, f"{source}: row {row}", column)
    return value


READERS = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
