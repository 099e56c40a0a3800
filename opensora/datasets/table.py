"""Tables of images and videos: CSV, or Parquet where pyarrow is installed.

A table has a column `path`, `text` for captions, and `num_frames`, `height`, `width` where samples go into buckets;
others are ignored. A CSV file of version 1.0 has no header: its columns are path and text.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensora.datasets.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from opensora.errors import ConfigError, did_you_mean

TEXTS, NUMBERS = ("path", "text"), ("num_frames", "height", "width")


class Texts(Sequence[str]):
    """Texts in two arrays: processes that are forked share them, while lists of objects get copied by and by."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self.ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self.data = np.frombuffer(b"".join(encoded), np.uint8)

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
    try:
        columns = _read_csv(source) if suffix == ".csv" else _read_parquet(source)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read ({error.strerror or error}); check data_path") from error
    if not columns["path"]:
        raise ConfigError(f"{source}: has no rows; give a table with at least one")
    texts = {
        name: Texts("" if cell is None else str(cell) for cell in columns[name]) for name in TEXTS if name in columns
    }
    numbers = {name: np.array([_number(cell) for cell in columns[name]]) for name in NUMBERS if name in columns}
    return Table(source, **texts, **numbers)


def _number(cell: object) -> float:
    """NaN for what is no finite number."""
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _read_csv(source: str) -> dict[str, list]:
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            rows = [row for row in reader if row]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise ConfigError(f"{source}: line {reader.line_num}: {error}; check its quotes") from error
    names = [name.strip() for name in rows[0]] if rows else ["path"]
    if "path" in names:
        rows = rows[1:]
    elif Path(names[0]).suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) or Path(names[0]).is_file():
        names = list(TEXTS)  # the first row of a table of 1.0
    else:
        raise _no_path(names, source)
    for row in rows:
        if len(row) > len(names):
            problem = f"has {len(row)} cells, more than the {len(names)} columns ({', '.join(names)})"
            raise ConfigError(f"{source}: the row of {row[0]!r} {problem}; put texts with commas in quotes")
    wanted = {name: names.index(name) for name in (*TEXTS, *NUMBERS) if name in names}
    return {name: [row[i] if i < len(row) else "" for row in rows] for name, i in wanted.items()}


def _no_path(names: list[str], source: str) -> ConfigError:
    near = [name for name in names if did_you_mean("path", [name])]
    problem = f"has no column 'path', only {', '.join(names)[:200]}"
    return ConfigError(f"{source}: {problem}; {f'rename {near[0]!r}' if near else 'name one so'}")


def _read_parquet(source: str) -> dict[str, list]:
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
            return content.read([name for name in (*TEXTS, *NUMBERS) if name in names]).to_pydict()
    except ArrowException as error:
        raise ConfigError(f"{source}: cannot be read as Parquet ({error}); save it anew") from error
