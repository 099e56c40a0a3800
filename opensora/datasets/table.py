"""Tables of images and videos: CSV, or Parquet where pyarrow is installed.

A table has a column `path`, `text` for captions, and `num_frames`, `height`, `width` where samples go into buckets;
others are ignored. A CSV file of version 1.0 has no header: its columns are path and text.
"""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from opensora.datasets.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from opensora.errors import ConfigError, did_you_mean

TEXTS, NUMBERS = ("path", "text"), ("num_frames", "height", "width")
CHUNK = 2**11  # rows read together: their texts take many times the memory of the arrays they become, and fit a cache


class Texts(Sequence[str]):
    """Texts in two arrays: processes that are forked share them, while lists of objects get copied by and by."""

    def __init__(self, texts: Iterable[str]) -> None:
        data, lengths, texts = bytearray(), array("q"), iter(texts)
        while part := [text.encode("utf-8", "surrogatepass") for text in islice(texts, CHUNK)]:
            data += b"".join(part)
            lengths.extend(map(len, part))
        self.ends = np.cumsum(np.frombuffer(lengths, np.int64) if lengths else [], dtype=np.int64)
        self.data = np.frombuffer(data, np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        first = self.ends[index - 1] if index else 0
        return self.data[first : self.ends[index]].tobytes().decode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Table:
    """Columns of N rows. `num_frames`, `height`, `width` are float64 [N] with NaN for cells that hold no number."""

    source: str
    path: Texts
    text: Texts | None = None
    num_frames: np.ndarray | None = None
    height: np.ndarray | None = None
    width: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.path)

    def sizes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The columns num_frames, height, width that buckets need; ConfigError if one is missing."""
        for name in NUMBERS:
            if getattr(self, name) is None:
                raise ConfigError(f"{self.source}: has no column {name}, which bucket_config needs; add it")
        return self.num_frames, self.height, self.width


def read_table(path: str | Path | None) -> Table:
    """The table in a .csv or .parquet file; ConfigError if it cannot be read, has no column `path`, or no rows."""
    if not path:
        raise ConfigError("data_path is not set; give a table of videos with --data-path")
    source, suffix = str(path), Path(path).suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise ConfigError(f"{source}: a table is a .csv or .parquet file; convert it")
    columns: dict[str, list[Any]] = {}
    try:
        for name, cells in _read_csv(source) if suffix == ".csv" else _read_parquet(source):
            columns.setdefault(name, []).append(Texts(cells) if name in TEXTS else _numbers(cells))
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read ({error.strerror or error}); check data_path") from error
    if not columns:
        raise ConfigError(f"{source}: has no rows; give a table with at least one")
    return Table(
        source, **{name: (_joined if name in TEXTS else np.concatenate)(columns.pop(name)) for name in [*columns]}
    )


def _joined(parts: Sequence[Texts]) -> Texts:
    """Texts one after another."""
    whole = Texts(())
    lengths = np.concatenate([np.diff(part.ends, prepend=0) for part in parts])
    whole.ends, whole.data = np.cumsum(lengths), np.concatenate([part.data for part in parts])
    return whole


def _numbers(cells: Sequence[Any]) -> np.ndarray:
    """float64 [N], NaN for what is no finite number."""
    try:
        numbers = np.fromiter(map(float, cells), np.float64, len(cells))
    except (TypeError, ValueError):
        numbers = np.fromiter(map(_number, cells), np.float64, len(cells))
    numbers[~np.isfinite(numbers)] = math.nan
    return numbers


def _number(cell: object) -> float:
    """NaN for what is no number."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


def _read_csv(source: str) -> Iterator[tuple[str, Sequence[str]]]:
    """Columns that a table has a use for, some thousand rows of each at a time."""
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            rows = (row for row in reader if row)
            first = next(rows, ["path"])
            names, header = _names(first, source)
            wanted = {name: names.index(name) for name in (*TEXTS, *NUMBERS) if name in names}
            rows = rows if header else chain([first], rows)
            while part := list(islice(rows, CHUNK)):
                if max(map(len, part)) > len(names):
                    raise _too_long(part, names, source)
                cells = list(zip_longest(*part, fillvalue=""))
                cells += [("",) * len(part)] * (len(names) - len(cells))
                yield from ((name, cells[number]) for name, number in wanted.items())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise ConfigError(f"{source}: line {reader.line_num}: {error}; check its quotes") from error


def _names(first: list[str], source: str) -> tuple[list[str], bool]:
    """The names of the columns, and whether the first row has them."""
    names = [name.strip() for name in first]
    if "path" in names:
        return names, True
    if Path(names[0]).suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) or Path(names[0]).is_file():
        return list(TEXTS), False  # a table of 1.0
    raise _no_path(names, source)


def _too_long(rows: Sequence[list[str]], names: Sequence[str], source: str) -> ConfigError:
    row = next(row for row in rows if len(row) > len(names))
    problem = f"has {len(row)} cells, more than the {len(names)} columns ({', '.join(names)})"
    return ConfigError(f"{source}: the row of {row[0]!r} {problem}; put texts with commas in quotes")


def _no_path(names: list[str], source: str) -> ConfigError:
    near = [name for name in names if did_you_mean("path", [name])]
    problem = f"has no column 'path', only {', '.join(names)[:200]}"
    return ConfigError(f"{source}: {problem}; {f'rename {near[0]!r}' if near else 'name one so'}")


def _read_parquet(source: str) -> Iterator[tuple[str, Sequence[Any]]]:
    """As `_read_csv`."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(f"{source}: Parquet needs pyarrow; pip install pyarrow, or save it as CSV") from error
    try:
        with open(source, "rb") as file:
            content = parquet.ParquetFile(file)
            names = content.schema_arrow.names
            if "path" not in names:
                raise _no_path(names, source)
            wanted = [name for name in (*TEXTS, *NUMBERS) if name in names]
            for batch in content.iter_batches(CHUNK, columns=wanted):
                for name in wanted:
                    cells = batch.column(name).to_pylist()
                    yield name, ["" if cell is None else str(cell) for cell in cells] if name in TEXTS else cells
    except ArrowException as error:
        raise ConfigError(f"{source}: cannot be read as Parquet ({error}); save it anew") from error
