"""Content hashes of large checkpoints, remembered so that their files are not hashed at every start.

A remembered hash holds for the same files alone: path, inode, size, and the times of the last change of content and of
attributes, which a program cannot set back.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from opensora.checkpoints.hub import checkpoint_files
from opensora.checkpoints.key_mapping import TensorDict
from opensora.checkpoints.summary import content_hash
from opensora.config.schema import Sha256, check
from opensora.errors import MediaError, WeightsError
from opensora.files import atomic_write, cache_path, read_json

MIN_BYTES = 2**28  # of a checkpoint whose hash is remembered; smaller ones are hashed in a moment
MAX_ENTRIES = 100
SETTLED = 2.0  # seconds since the last change; a later change could bear the same time


class FileIdentity:
    """The files of a checkpoint as they are now. Take it before they are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = {str(file.resolve()): file.stat() for file in checkpoint_files(path)}
        self.size = sum(stat.st_size for stat in files.values())
        self.changed = max(max(stat.st_mtime, stat.st_ctime) for stat in files.values())
        self.key = _key(files)

    def content_hash(self, tensors: TensorDict) -> str:
        """`content_hash` of the tensors read from these files; remembered if the files are large."""
        if self.size < MIN_BYTES:
            return content_hash(tensors)
        remembered = _read().get(self.key)
        if remembered and self._is_current():
            return remembered
        found = content_hash(tensors)
        if time.time() - self.changed > SETTLED and self._is_current():
            _write({**_read(), self.key: found})
        return found

    def _is_current(self) -> bool:
        """Whether the files are still the same."""
        try:
            return FileIdentity(self.path).key == self.key
        except (OSError, WeightsError):
            return False


def _key(files: Mapping[str, os.stat_result]) -> str:
    parts = [
        (path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for path, stat in files.items()
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read() -> dict[str, str]:
    """Key of files -> content hash, in the order of writing; empty if the file cannot be read."""
    with suppress(MediaError):
        return check(dict[Sha256, Sha256], read_json(_file()), error=MediaError)
    return {}


def _write(known: dict[str, str]) -> None:
    text = json.dumps(dict(list(known.items())[-MAX_ENTRIES:]))
    with suppress(MediaError), atomic_write(_file(), make_folders=True) as [temporary]:
        temporary.write_text(text, encoding="utf-8")


def _file() -> Path:
    return cache_path("weights.json")
