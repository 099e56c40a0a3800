"""The items of a run's data, recorded so that a resumed run can name the items that have changed.

An item is a row of a table with its file, or a shard of features. Its key hashes contents alone, so moving or renaming
files changes nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.save import save_file
from opensora.datasets.columns import NUMBERS
from opensora.datasets.encoded import EncodedDataset
from opensora.datasets.file_content import KEY_BYTES, content_key, content_keys
from opensora.datasets.table import Table, TextColumn
from opensora.errors import WeightsError

FILE = "data.safetensors"
MAX_NAMES = 3  # in a message


@dataclass(frozen=True)
class DataRecord:
    """Items [N] by name, with hashes uint8 [N, 16] of their table cells (`cells`) and of their files (`files`)."""

    kind: str  # "row" or "shard"
    names: Sequence[str]
    cells: np.ndarray
    files: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        """A hash of all items in order."""
        return hashlib.sha256(b"".join(part.tobytes() for part in (self.cells, self.files))).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the record into the folder of a run."""
        texts = self.names if isinstance(self.names, TextColumn) else TextColumn(self.names)
        columns: dict[str, np.ndarray] = {"ends": texts.ends, "names": texts.data}
        columns |= {"cells": self.cells, "files": self.files}
        save_file({name: torch.from_numpy(column.copy()) for name, column in columns.items()}, folder / FILE)

    def changes_since(self, other: DataRecord) -> str:
        """The differences to an earlier record, in words with the first names; empty if there are none."""
        if self.digest == other.digest:
            return ""
        before, now = other._keys(), self._keys()
        gone, new = _only(before, now), _only(now, before)
        left = {other.names[number]: number for number in gone}
        pairs = {number: left.pop(self.names[number]) for number in new if self.names[number] in left}
        paired = set(pairs.values())
        changed = [f"{self.names[one]} ({self._what(one, other, old)})" for one, old in pairs.items()]
        added = [self.names[one] for one in new if one not in pairs]
        removed = [other.names[one] for one in gone if one not in paired]
        parts = {"changed": changed, "added": added, "removed": removed}
        changes = [f"{len(names)} {self.kind}s {what}: {_some(names)}" for what, names in parts.items() if names]
        return ", ".join(changes) or f"the {self.kind}s are in another order"

    def _keys(self) -> list[bytes]:
        return [cells.tobytes() + file.tobytes() for cells, file in zip(self.cells, self.files, strict=True)]

    def _what(self, number: int, other: DataRecord, old: int) -> str:
        """What has changed in an item, in words."""
        parts = []
        if not np.array_equal(self.cells[number], other.cells[old]):
            parts.append("its cells")
        if not np.array_equal(self.files[number], other.files[old]):
            here, before = self.files[number].any(), other.files[old].any()
            parts.append("its file" if here and before else f"its file {'was' if here else 'is'} not there")
        return " and ".join(parts)


def cells_of(table: Table) -> np.ndarray:
    """Hashes uint8 [N, 16] of the texts, sizes, spans and crops of all rows."""
    columns = [getattr(table, name) for name in NUMBERS]
    cells = np.empty((len(table), KEY_BYTES), np.uint8)
    for row in range(len(table)):
        text = "" if table.text is None else table.text[row]
        numbers = [None if column is None else float(column[row]) for column in columns]
        described = (text, numbers) if table.parts is None else (text, numbers, table.parts[row].tolist())
        key = hashlib.blake2b(repr(described).encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()
        cells[row] = np.frombuffer(key, np.uint8)
    return cells


def record_of_table(table: Table, cells: np.ndarray) -> DataRecord:
    """The record of a table: hashes of its rows (`cells_of`) and of their files (`content_key`)."""
    names = table.path if table.parts is None else TextColumn(map(table.name, range(len(table))))
    return DataRecord("row", names, cells, content_keys([table.file(row) for row in range(len(table))]))


def record_of_features(dataset: EncodedDataset) -> DataRecord:
    """The record of a features folder: hashes of the rows and sources of each shard, and of its content."""
    names, cells, files = dataset.shards.files, [], []
    for name in names:
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        for key, kind in (("row", np.int64), ("key", np.uint8)):
            digest.update(dataset.shards.column(name, key, kind).tobytes())
        cells.append(np.frombuffer(digest.digest(), np.uint8))
        files.append(content_key(str(dataset.folder / name)))
    return DataRecord("shard", names, np.stack(cells), np.stack(files))


def read_record(folder: Path, kind: str) -> DataRecord | None:
    """The record in the folder of a run; None if there is none or it cannot be read."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        columns = {name: tensor.numpy() for name, tensor in read_state_dict(path).items()}
        return _checked(kind, **columns)
    except (WeightsError, TypeError, ValueError):
        return None


def _checked(kind: str, ends: np.ndarray, names: np.ndarray, cells: np.ndarray, files: np.ndarray) -> DataRecord:
    """The record of these columns. Raises ValueError if they are inconsistent."""
    shaped = cells.shape == files.shape == (len(ends), KEY_BYTES) and names.ndim == 1 and len(ends)
    typed = ends.dtype == np.int64 and names.dtype == cells.dtype == files.dtype == np.uint8
    if not (shaped and typed and (np.diff(ends, prepend=0) >= 0).all() and ends[-1] == len(names)):
        raise ValueError("no record of data")
    texts = TextColumn(())
    texts.ends, texts.data = ends, names
    return DataRecord(kind, texts, cells, files)


def _only(ones: Sequence[bytes], others: Sequence[bytes]) -> list[int]:
    """The indices of the elements of the multiset `ones` that `others` lacks."""
    left, found = Counter(others), []
    for number, one in enumerate(ones):
        left[one] -= 1
        if left[one] < 0:
            found.append(number)
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
