"""Calibrations that earlier runs found, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from opensora.acceleration.step_cache.calibration import Calibration
from opensora.acceleration.step_cache.table import CacheTable
from opensora.errors import ConfigError, MediaError
from opensora.files import atomic_write, cache_path

FORMAT = 2


def key_of(**inputs: Any) -> str:
    """The name of a calibration, a hash of all its inputs."""
    text = json.dumps({"format": FORMAT, **inputs}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def load(key: str) -> Calibration | None:
    """The calibration that an earlier run has saved, if any."""
    with suppress(OSError, ValueError, KeyError, TypeError, ConfigError):
        stored = json.loads(_file(key).read_text(encoding="utf-8"))
        table = None if stored["table"] is None else CacheTable.from_dict(stored["table"])
        return Calibration(table, [float(error) for error in stored["errors"]])
    return None


def save(key: str, found: Calibration) -> None:
    """Saves a calibration for later runs; if the folder cannot be written, they calibrate again."""
    table = None if found.table is None else found.table.to_dict()
    with suppress(MediaError), atomic_write(_file(key), make_folders=True) as [temporary]:
        temporary.write_text(json.dumps({"table": table, "errors": found.errors}), encoding="utf-8")


def _file(key: str) -> Path:
    return cache_path("caching", f"{key}.json")
