"""Tables of images and videos: CSV, JSON lines, or Parquet if pyarrow is installed.

Columns: `path`, `text` for captions, `num_frames`, `height`, `width` for buckets, and `start_pts`, `end_pts`, `crop`
for parts of files; others are ignored. CSV files of Open-Sora 1.0 have no header: their columns are path and text.
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

from opensora.datasets import clip_columns, columns
from opensora.datasets.clip_columns import NONE
from opensora.datasets.columns import CLIP, NUMBERS, TEXTS, Notes
from opensora.datasets.table_files import CHUNK, READERS, kinds, metadata_of
from opensora.datasets.video.span import Crop, Span
from opensora.errors import ConfigError
from opensora.files import error_message


class TextColumn(Sequence[str]):
    """A sequence of texts in two arrays, which forked workers share; lists of str would be copied page by page."""

    def __init__(self, texts: Iterable[str]) -> None:
        data, lengths, texts = bytearray(), array("q"), iter(texts)
        while part := [text.encode("utf-8", "surrogatepass") for text in islice(texts, CHUNK)]:
            data += b"".join(part)
            lengths.extend(map(len, part))
        self.ends = np.cumsum(np.frombuffer(lengths, np.int64) if lengths else [], dtype=np.int64)
        self.data = np.frombuffer(data, np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        first = self.ends[index - 1] if index else 0
        return self.data[first : self.ends[index]].tobytes().decode("utf-8", "surrogatepass")

    def count_empty(self) -> int:
        """The number of empty or blank texts."""
        lengths = np.diff(self.ends, prepend=0)
        blank = sum(not self[row].strip() for row in np.flatnonzero((lengths > 0) & (lengths <= 16)).tolist())
        return int(np.count_nonzero(lengths == 0)) + blank


class MissingFiles(NamedTuple):
    """Rows [N] with missing files, and the paths tried for the first of them."""

    rows: np.ndarray
    tried: list[str]


@dataclass(frozen=True)
class Table:
    """Columns of N rows. `num_frames`, `height`, `width` are float64 [N] with NaN for cells without a number.

    `path` holds the cells as written; `file` resolves them. `parts` int64 [N, 6] are spans and crops, as
    `clip_columns.parts` makes them; None for a table of whole files.
    """

    source: str
    path: TextColumn
    text: TextColumn | None = None
    num_frames: np.ndarray | None = None
    height: np.ndarray | None = None
    width: np.ndarray | None = None
    parts: np.ndarray | None = None
    folder: str = ""
    folder_first: bool = False

    def __len__(self) -> int:
        return len(self.path)

    def sizes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The columns num_frames, height, width; the size of the crop where there is one.

        Raises ConfigError if a column is missing.
        """
        num_frames, height, width = found = (self.num_frames, self.height, self.width)
        if num_frames is None or height is None or width is None:
            name = next(name for name, column in zip(NUMBERS, found, strict=True) if column is None)
            raise ConfigError(f"{self.source}: has no column {name}, which bucket_config needs; add it")
        if self.parts is not None:
            cropped, (tall, wide) = self.parts[:, 4] != NONE, self.parts[:, 4:].T
            height, width = np.where(cropped, tall, height), np.where(cropped, wide, width)
        return num_frames, height, width

    def parts_of(self, rows: np.ndarray) -> np.ndarray:
        """`parts` of some rows, for whole files too."""
        return np.full((len(rows), 6), NONE, np.int64) if self.parts is None else self.parts[rows]

    def span(self, row: int) -> Span | None:
        """The frames of the file that a row stands for; None for all."""
        start, end = (NONE, NONE) if self.parts is None else self.parts[row, :2].tolist()
        return None if start == NONE else Span(start, None if end == NONE else end)

    def crop(self, row: int) -> Crop | None:
        """The part of the picture that a row stands for; None for all."""
        rectangle = [NONE] if self.parts is None else self.parts[row, 2:].tolist()
        return None if NONE in rectangle else Crop(*rectangle)

    def name(self, row: int) -> str:
        """The path of a row as written, with its span and crop."""
        span, crop = self.span(row), self.crop(row)
        return f"{self.path[row]}{'' if span is None else f' {span}'}{'' if crop is None else f' crop {crop}'}"

    def file(self, row: int) -> str:
        """The file of a row: the first existing one of `candidate_paths`, or else the path as written."""
        path = self.path[row]
        return next((candidate for candidate in self.candidate_paths(path) if os.path.isfile(candidate)), path)

    def candidate_paths(self, path: str) -> Iterator[str]:
        """Candidates for a path: as written, stripped, with `\\` replaced, with `~` expanded.

        Each is relative to the working directory, then to the folder of the table; in the reverse order for a folder
        with metadata.csv, as on the hub.
        """
        stripped = path.strip()
        slashed = stripped.replace("\\", "/")
        spellings = dict.fromkeys((path, stripped, slashed, os.path.expanduser(slashed)))
        for base in (self.folder, "") if self.folder_first else ("", self.folder):
            yield from (os.path.join(base, spelling) for spelling in spellings if spelling and base is not None)

    def missing(self) -> MissingFiles:
        """The rows with missing files. Lists each folder once instead of checking each file."""
        there = _FolderListings()
        rows = [
            row
            for row, path in enumerate(self.path)
            if path not in there and not any(map(there.holds, self.candidate_paths(path)))
        ]
        tried = list(dict.fromkeys(self.candidate_paths(self.path[rows[0]]))) if rows else []
        return MissingFiles(np.array(rows, np.int64), tried)

    def empty_texts(self) -> int:
        """The number of rows without a caption."""
        return len(self) if self.text is None else self.text.count_empty()


class _FolderListings:
    """Cached listings of folders."""

    def __init__(self) -> None:
        self.names: dict[str, frozenset[str] | None] = {}

    def __contains__(self, path: str) -> bool:
        folder, separator, name = path.rpartition(os.sep)
        if folder not in self.names:
            self.names[folder] = _listed(folder + separator or os.curdir)
        names = self.names[folder]
        return names is not None and name in names

    def holds(self, path: str) -> bool:
        """Whether a file exists, also on case-insensitive file systems."""
        return path in self or (self.names[path.rpartition(os.sep)[0]] is not None and os.path.isfile(path))


def _listed(folder: str) -> frozenset[str] | None:
    """The file names in a folder; None if it does not exist, empty if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError:
        return frozenset()


def read_table(path: str | Path | None) -> Table:
    """Reads a .csv, .jsonl or .parquet file, or a folder with metadata.csv or metadata.jsonl.

    Raises ConfigError if it cannot be read, or has no column `path` or no rows.
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
                if name in TEXTS:
                    parts.setdefault(name, []).append(TextColumn(columns.texts(name, cells, part.where, source)))
                elif name in NUMBERS:
                    parts.setdefault(name, []).append(columns.numbers(name, cells, part.where, source, notes))
            clips = {name: part.cells[name] for name in CLIP if name in notes.columns}
            parts.setdefault("parts", []).append(clip_columns.parts(clips, len(part.cells["path"]), part.where, source))
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read ({error_message(error)}); check data_path") from error
    if not parts:
        raise ConfigError(f"{source}: has no rows; give a table with at least one")
    notes.log()
    whole: dict[str, Any] = {}
    for name in notes.columns - set(CLIP):
        whole[name] = (_joined if name in TEXTS else np.concatenate)(parts.pop(name))
    clip_columns.check_columns(notes.columns, source)
    if notes.columns & set(CLIP):
        whole["parts"] = np.concatenate(parts.pop("parts"))
    return Table(source, **whole, folder=os.path.dirname(source), folder_first=laid_out)


def _joined(parts: Sequence[TextColumn]) -> TextColumn:
    """Concatenates texts."""
    whole = TextColumn(())
    lengths = np.concatenate([np.diff(part.ends, prepend=0) for part in parts])
    whole.ends, whole.data = np.cumsum(lengths), np.concatenate([part.data for part in parts])
    return whole
