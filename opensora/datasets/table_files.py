"""Reads table files in chunks: CSV with any common separator, JSON lines, Parquet."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from opensora.config.schema import MAX_TEXT
from opensora.datasets import columns
from opensora.datasets.columns import SPELLINGS, TEXTS, Notes, Where
from opensora.datasets.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from opensora.errors import ConfigError
from opensora.files import open_regular, parse_json

CHUNK = 2**11  # rows per chunk; Python strings take many times the memory of the final arrays
MAX_LINE = 2**20  # characters
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_CELL_END = re.compile(r"[,;\t|]")
_SEPARATOR_LINE = re.compile(r'"?sep=([^"\w\r\n])"?(?:\1|[,;\t|\s])*', re.IGNORECASE)  # as spreadsheets write it
_MARKS = {
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


class Part(NamedTuple):
    """A chunk of rows: cells by column, and the location of each row."""

    cells: Mapping[str, Sequence[Any]]
    where: Where


def read_csv(source: str, notes: Notes) -> Iterator[Part]:
    """Reads a CSV file. Raises ConfigError if it is invalid, or a row has more cells than there are columns."""
    try:
        with CsvFile(source) as table:
            number = 0
            notes.columns.update(table.places)
            while part := list(islice(table.rows, CHUNK)):
                if any(not row[0] or row[0][0] in "# \t" for row in part):
                    part = [row for row in part if table.counts(row)]
                if not part:
                    continue
                where = line_of(source, number)
                part = even_cells(part, table, where, notes)
                cells = list(zip_longest(*part, fillvalue=""))
                cells += [("",) * len(part)] * (len(table.names) - len(cells))
                yield Part({name: cells[place] for name, place in table.places.items()}, where)
                number += len(part)
    except csv.Error as error:
        raise ConfigError(csv_problem(error, source, table)) from error


class CsvFile:
    """The rows of a CSV file after its header; `names` are all columns, `places` the indices of the known ones.

    Raises ConfigError without a column `path`, unless `any_columns` are accepted.
    """

    def __init__(self, source: str, any_columns: bool = False) -> None:
        self.source, self.any_columns, self.file = source, any_columns, open_regular(source, ConfigError)
        self.lines = text_lines(self.file, source)
        self.reader: Any = None
        try:
            self._begin()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> CsvFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    @property
    def line(self) -> int:
        """The number of the last line read."""
        return self.before + (self.reader.line_num if self.reader else 0)

    def _begin(self) -> None:
        self.before, separator, line = 0, None, ""
        for before, line in enumerate(self.lines):
            self.before = before
            if match := _SEPARATOR_LINE.fullmatch(line.strip("\r\n")):
                separator = match[1]
            elif line.strip() and (not line.startswith("#") or _names_media(_CELL_END.split(line, 1)[0])):
                break
        else:
            line = ""
        choices = [separator] if separator else list(SEPARATORS)
        self.separator, self.names, self.places, header = _detect_format(line, choices, self.source, self.any_columns)
        blanks = header and any(name.startswith(" ") for name in self.names)  # `path, text`
        self.reader = csv.reader(
            chain([line], self.lines), delimiter=self.separator, strict=True, skipinitialspace=blanks
        )
        while self.names and not self.names[-1].strip():
            self.names.pop()
        self.rows = islice((row for row in self.reader if row), int(header), None)

    def counts(self, row: Sequence[str]) -> bool:
        """Whether a row is neither a comment nor blank."""
        comment = row[0].startswith("#") and len(row) < len(self.names) and not _names_media(row[0])
        return not comment and any(map(str.strip, row))


def _detect_format(
    line: str, separators: Sequence[str], source: str, any_columns: bool
) -> tuple[str, list[str], dict[str, int], bool]:
    """(separator, column names, indices of known columns, whether the first line is a header)."""
    if not line:
        return ",", *(([], {}) if any_columns else (["path"], {"path": 0})), False
    readings = []
    for separator in separators:
        try:
            names = next(csv.reader([line], delimiter=separator), [])
        except csv.Error:  # field too long
            names = line[:200].split(separator)
        places = columns.find_columns(names, source)
        readings.append(
            ("path" in places, _names_media(names[0]) if names else False, len(names), separator, names, places)
        )
    header, media, _, separator, names, places = max(readings, key=lambda reading: reading[:3])
    if header:
        return separator, names, places, True
    if media:  # a table of Open-Sora 1.0, without header
        return separator, list(TEXTS), {name: place for place, name in enumerate(TEXTS)}, False
    if any_columns:
        return separator, names, places, True
    raise columns.missing_path_error([name.strip() for name in names], source)


def _names_media(text: str) -> bool:
    """Whether a text looks like the path of an image or video."""
    path = text.strip().strip('"')
    return Path(path).suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) or os.path.isfile(path)


def even_cells(part: list[list[str]], table: CsvFile, where: Where, notes: Notes) -> list[list[str]]:
    """Removes surplus empty cells. Raises ConfigError for surplus cells that are not empty."""
    lengths, width = list(map(len, part)), len(table.names)
    if max(lengths) > width:
        for row, cells in enumerate(part):
            if any(cell.strip() for cell in cells[width:]):
                problem = f"has {len(cells)} cells, more than the {width} columns ({', '.join(table.names)[:200]})"
                kind = SEPARATORS.get(table.separator, repr(table.separator))
                shown = columns.shortened(cells[0])
                raise ConfigError(
                    f"{table.source}: {where(row)}: the row of {shown!r} {problem}; put texts with {kind} in quotes"
                )
        part = [cells[:width] for cells in part]
    needed = max(table.places.values(), default=0) + 1
    if min(lengths) < needed:
        short = [row for row, length in enumerate(lengths) if length < needed]
        notes.add(f"have fewer cells than the {width} columns; those that are missing count as empty", short, where)
    return part


def line_of(source: str, first: int, any_columns: bool = False) -> Where:
    """A function row -> "line N". It reads the file again, as it is only called for a message."""

    def where(row: int) -> str:
        with CsvFile(source, any_columns) as table:
            next(islice(filter(table.counts, table.rows), first + row, None))
            return f"line {table.line}"

    return where


def csv_problem(error: csv.Error, source: str, table: CsvFile) -> str:
    if "field limit" in str(error):
        return (
            f"{source}: line {table.line}: a cell has more than {csv.field_size_limit():,} characters, and a text may "
            f"have {MAX_TEXT:,}; shorten it, or close a quote that is open before"
        )
    return f"{source}: line {table.line}: {error}; check its quotes"


def text_lines(file: Any, source: str) -> Iterator[str]:
    """Yields the lines of a text file, in UTF-8 or by its byte order mark. Raises ConfigError for other files."""
    head = file.read(4096)
    mark = next((mark for mark in _MARKS if head.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    if encoding == "utf-8" and b"\0" in head:
        raise ConfigError(f"{source}: is not text, or UTF-16 without a mark; save it as UTF-8")
    file.seek(len(mark) if encoding == "utf-8" else 0)
    errors = "surrogateescape" if encoding == "utf-8" else "strict"  # file names need not be UTF-8
    text = io.TextIOWrapper(file, encoding, errors, newline="")
    try:
        while line := text.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise ConfigError(f"{source}: has a line of more than {MAX_LINE:,} characters; is it a table?")
            yield line
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: is not {encoding.upper()} text (byte {error.start}); save it as UTF-8") from error


def read_jsonl(source: str, notes: Notes) -> Iterator[Part]:
    """Reads JSON lines. Raises ConfigError for a line that is not an object or lacks a path."""
    with open_regular(source, ConfigError) as file:
        numbered = ((number, line) for number, line in enumerate(text_lines(file, source), start=1) if line.strip())
        places: dict[tuple[str, ...], dict[str, int]] = {}
        while part := list(islice(numbered, CHUNK)):
            cells: dict[str, list[Any]] = {name: [] for name in SPELLINGS}
            for number, line in part:
                row = json_row(line, f"{source}: line {number}")
                keys = tuple(row)
                if keys not in places:
                    if len(places) >= CHUNK:
                        raise ConfigError(
                            f"{source}: line {number}: its rows have too many different keys; write the same"
                        )
                    places[keys] = columns.find_columns(keys, f"{source}: line {number}")
                    notes.columns.update(places[keys])
                    if "path" not in places[keys]:
                        raise columns.missing_path_error(keys, f"{source}: line {number}")
                values = tuple(row.values())
                for name, column in cells.items():
                    place = places[keys].get(name)
                    column.append(None if place is None else values[place])
            yield Part(cells, _numbered([number for number, _ in part]))


def json_row(line: str, where: str) -> dict[str, Any]:
    row = parse_json(line, where, ConfigError)
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: must be a JSON object with the keys path and text; write one a line")
    return row


def _numbered(numbers: Sequence[int]) -> Where:
    return lambda row: f"line {numbers[row]}"


def _numbered_from(first: int) -> Where:
    return lambda row: f"row {first + row}"


def read_parquet(source: str, notes: Notes) -> Iterator[Part]:
    """Reads a Parquet file. Raises ConfigError if it is invalid or a column has the wrong type."""
    from opensora.datasets.parquet import parts

    for first, cells in parts(source):
        notes.columns.update(cells)
        yield Part(cells, _numbered_from(first))


READERS = {".csv": read_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}


def kinds() -> str:
    """The suffixes of tables, as a list in words."""
    *others, last = READERS
    return f"{', '.join(others)} or {last}"


def metadata_of(folder: str | Path) -> str:
    """The metadata file of a folder, as on the hub. Raises ConfigError unless there is exactly one."""
    found = [name for name in (f"metadata{suffix}" for suffix in READERS) if Path(folder, name).exists()]
    if len(found) == 1:
        return str(Path(folder, found[0]))
    problem = (
        f"holds {' and '.join(found)}; name one of them"
        if found
        else (
            "cannot be read as a table: it is a folder without metadata.csv or metadata.jsonl; "
            f"make one with `opensora table {folder} OUT.csv`"
        )
    )
    raise ConfigError(f"{folder}: {problem}")
