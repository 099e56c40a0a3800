"""Tables of images and videos: CSV, JSON lines, or Parquet where pyarrow is installed.

A table has a column `path`, `text` for captions, and `num_frames`, `height`, `width` where samples go into buckets;
others are ignored. A CSV file of version 1.0 has no header: its columns are path and text.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opensora.datasets import columns
from opensora.datasets.columns import NUMBERS, TEXTS, Notes
from opensora.datasets.table_files import CHUNK, READERS, kinds, metadata_of
from opensora.errors import ConfigError
from opensora.files import why


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

    def count_empty(self) -> int:
        """How many are empty or blank."""
        lengths = np.diff(self.ends, prepend=0)
        blank = sum(not self[row].strip() for row in np.flatnonzero((lengths > 0) & (lengths <= 16)).tolist())
        return int(np.count_nonzero(lengths == 0)) + blank


class Missing(NamedTuple):
    """Rows [N] whose files are not there, and the paths that were tried for the first of them."""

    rows: np.ndarray
    tried: list[str]


@dataclass(frozen=True)
class Table:
    """Columns of N rows. `num_frames`, `height`, `width` are float64 [N] with NaN for cells that hold no number.

    `path` is what the cells hold; `file` is where that leads.
    """

    source: str
    path: Texts
    text: Texts | None = None
    num_frames: np.ndarray | None = None
    height: np.ndarray | None = None
    width: np.ndarray | None = None
    folder: str = ""
    folder_first: bool = False

    def __len__(self) -> int:
        return len(self.path)

    def sizes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The columns num_frames, height, width that buckets need; ConfigError if one is missing."""
        for name in NUMBERS:
            if getattr(self, name) is None:
                raise ConfigError(f"{self.source}: has no column {name}, which bucket_config needs; add it")
        return self.num_frames, self.height, self.width

    def file(self, row: int) -> str:
        """The file of a row: the first of `places` that is there, or else the path as it is written."""
        path = self.path[row]
        return next((place for place in self.places(path) if os.path.isfile(place)), path)

    def places(self, path: str) -> Iterator[str]:
        """Where a path may lead: as it is written, without blanks around it, with `~` and backslashes replaced.

        Each of these from the working directory, then from the folder of the table; the other way round for the table
        of a folder that is laid out as on the hub.
        """
        stripped = path.strip()
        slashed = stripped.replace("\\", "/")
        spellings = dict.fromkeys((path, stripped, slashed, os.path.expanduser(slashed)))
        for base in (self.folder, "") if self.folder_first else ("", self.folder):
            yield from (os.path.join(base, spelling) for spelling in spellings if spelling and base is not None)

    def missing(self) -> Missing:
        """The rows whose files are not there. It lists each folder once, rather than to look for each file."""
        there = _Listings()
        rows = [
            row
            for row, path in enumerate(self.path)
            if path not in there and not any(map(there.holds, self.places(path)))
        ]
        tried = list(dict.fromkeys(self.places(self.path[rows[0]]))) if rows else []
        return Missing(np.array(rows, np.int64), tried)

    def empty_texts(self) -> int:
        """How many rows have no caption."""
        return len(self) if self.text is None else self.text.count_empty()


class _Listings:
    """The names of files in folders, each of which is read once."""

    def __init__(self) -> None:
        self.names: dict[str, frozenset[str] | None] = {}

    def __contains__(self, path: str) -> bool:
        folder, separator, name = path.rpartition(os.sep)
        if folder not in self.names:
            self.names[folder] = _listed(folder + separator or os.curdir)
        names = self.names[folder]
        return names is not None and name in names

    def holds(self, path: str) -> bool:
        """Whether there is such a file, also where a disk finds names in other spellings."""
        return path in self or (self.names[path.rpartition(os.sep)[0]] is not None and os.path.isfile(path))


def _listed(folder: str) -> frozenset[str] | None:
    """The names of the files in a folder; None where there is no such folder, empty where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError:
        return frozenset()


def read_table(path: str | Path | None) -> Table:
    """The table in a .csv, .jsonl or .parquet file, or in a folder with metadata.csv or metadata.jsonl.

    ConfigError if it cannot be read, has no column `path`, or no rows.
    """
    if not path:
        raise ConfigError("data_path is not set; give a table of videos with --data-path")
    source, laid_out = str(path), os.path.isdir(path)
    source = metadata_of(source) if laid_out else source
    reader = READERS.get(Path(source).suffix.lower())
    if reader is None:
        raise ConfigError(f"{source}: a table is a {kinds()} file; convert it")
    parts: dict[str, list[Any]] = {}
    notes = Notes(source)
    try:
        for part in reader(source, notes):
            for name, cells in part.cells.items():
                parts.setdefault(name, []).append(
                    Texts(columns.texts(name, cells, part.where, source))
                    if name in TEXTS
                    else columns.numbers(name, cells, part.where, source, notes)
                )
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read ({why(error)}); check data_path") from error
    if not parts:
        raise ConfigError(f"{source}: has no rows; give a table with at least one")
    notes.tell()
    whole = {name: (_joined if name in TEXTS else np.concatenate)(parts.pop(name)) for name in notes.columns}
    return Table(source, **whole, folder=os.path.dirname(source), folder_first=laid_out)


def _joined(parts: Sequence[Texts]) -> Texts:
    """Texts one after another."""
    whole = Texts(())
    lengths = np.concatenate([np.diff(part.ends, prepend=0) for part in parts])
    whole.ends, whole.data = np.cumsum(lengths), np.concatenate([part.data for part in parts])
    return whole
