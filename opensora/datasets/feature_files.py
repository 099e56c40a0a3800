"""The files of a features folder, validated on reading.

`features.json` describes what was encoded and how; `plan.json` lists the shards. `encoded.py` documents their content.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from torch import Tensor

from opensora.config.schema import Count, Name, Positive, Schema, Text, Triple, as_tuple, check
from opensora.errors import ConfigError
from opensora.files import read_json

IDENTITY, PLAN = "features.json", "plan.json"
COMMAND = "scripts/misc/extract_feat.py"
MOST_OPEN = 128  # memory-mapped shards
MAX_PLAN_BYTES = 2**26
MAX_ROWS = 2**28

# Relative paths that stay inside the folder.
LatentFile = Annotated[str, Field(pattern=r"^latents/crop\d+/[\w.-]*\w[\w.-]*/\d+-\d+\.safetensors$", max_length=200)]
TextFile = Annotated[str, Field(pattern=r"^text/\d+\.safetensors$", max_length=200)]


class PlannedLatents(Schema):
    """A shard of latents of one crop and one size (T, H, W)."""

    file: LatentFile
    crop: Count
    bucket: Annotated[tuple[Name, Positive, Name], as_tuple]  # resolution, frames, ratio
    size: Triple[Positive]
    batch_size: Positive


class PlannedTexts(Schema):
    """A shard of texts."""

    file: TextFile


class FeaturePlan(Schema):
    """The expected shards, and the table they were encoded from."""

    num_rows: Annotated[Count, Field(le=MAX_ROWS)]
    num_crops: Positive
    latents: list[PlannedLatents]
    text: list[PlannedTexts]
    table: Text | None = None


def caption_key(text: str) -> np.ndarray:
    """A 16-byte hash of a caption."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.frombuffer(digest, np.uint8)


class Shards:
    """The shards of a features folder: checked to be complete, opened on demand, `MOST_OPEN` at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.identity, plan = (_read(self.folder / name) for name in (IDENTITY, PLAN))
        self.plan = check(FeaturePlan, plan, str(self.folder / PLAN), remedy=f"run {COMMAND} again, which rewrites it")
        planned = self.files = [one.file for one in self.plan.latents] + [one.file for one in self.plan.text]
        missing = [name for name in planned if not (self.folder / name).is_file()]
        if missing:
            problem = f"{len(missing)} of {len(planned)} shards do not exist yet (the first is {missing[0]})"
            raise ConfigError(f"{self.folder}: {problem}; run {COMMAND} again, which encodes those alone")
        self._reset()

    def _reset(self) -> None:
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = Lock()  # prefetching threads share the open shards

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def require(self, **expected: Any) -> None:
        """Raises ConfigError unless features.json has these values; `vae`, `text_encoder`: SHA-256 of their weights."""
        for name, value in expected.items():
            if self.identity.get(name) != value:
                problem = f"was encoded with {name} {self.identity.get(name)}, and the run has {value}"
                raise ConfigError(f"{self.folder} {problem}; re-encode it with {COMMAND}, into another folder")

    def column(self, name: str, key: str, kind: type[np.generic]) -> np.ndarray:
        """A column of a shard. Raises ConfigError if it is missing or of another dtype."""
        column = tensor_of(self[name], key, self.folder / name).numpy()
        if column.dtype != kind:
            raise _damaged(self.folder / name, f"its column {key} is of another type")
        if key == "row" and len(column) and not 0 <= column.min() <= column.max() < self.plan.num_rows:
            raise _damaged(self.folder / name, f"its rows are not those of a table of {self.plan.num_rows} rows")
        return column

    def __getitem__(self, name: str) -> Any:
        """The opened shard."""
        with self._lock:
            if name not in self._open:
                if len(self._open) >= MOST_OPEN:
                    self._open.popitem(last=False)
                self._open[name] = open_shard(self.folder / name)
            self._open.move_to_end(name)
            return self._open[name]


def open_shard(path: Path) -> Any:
    """Memory-maps a shard. Raises ConfigError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error


def tensor_of(shard: Any, key: str, path: Path) -> Tensor:
    """A tensor of an open shard. Raises ConfigError if it is missing."""
    from safetensors import SafetensorError

    try:
        return shard.get_tensor(key)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path}: is damaged ({why}); remove it and run {COMMAND} again")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        problem = f"is not a folder of encoded features ({path.name} cannot be read)"
        raise ConfigError(f"{path.parent} {problem}; make one with {COMMAND}")
    return check(dict[str, Any], read_json(path, ConfigError, MAX_PLAN_BYTES), str(path))
