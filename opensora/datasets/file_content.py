"""Cheap fingerprints of files: size, modification time, and a hash of parts of the content."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

SAMPLE, PARTS = 2**16, 3  # bytes per part, and parts that are hashed
KEY_BYTES = 16
READERS = 16  # threads; network disks are slow to answer


def file_stamps(paths: Sequence[str]) -> np.ndarray:
    """(size in bytes, mtime in ns) of files, int64 [N, 2]; -1 if missing."""
    stamps = np.full((len(paths), 2), -1, np.int64)
    for number, path in enumerate(paths):
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            continue
        stamps[number] = status.st_size, status.st_mtime_ns
    return stamps


def content_key(path: str) -> np.ndarray:
    """A 16-byte hash of the length, beginning, middle and end of a file; zeros if unreadable.

    The frame index of a video is at its beginning or end, so a re-encoded file differs there.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block
            return np.zeros(KEY_BYTES, np.uint8)
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(str(length).encode(), digest_size=KEY_BYTES)
            for part in range(PARTS):
                file.seek(max(length - SAMPLE, 0) * part // (PARTS - 1))
                digest.update(file.read(SAMPLE))
    except (OSError, ValueError):
        return np.zeros(KEY_BYTES, np.uint8)
    return np.frombuffer(digest.digest(), np.uint8)


def content_keys(paths: Sequence[str]) -> np.ndarray:
    """`content_key` of each file, uint8 [N, 16]; a path that is there several times is read once."""
    distinct = list(dict.fromkeys(paths))
    keys = dict(zip(distinct, _in_threads(content_key, distinct), strict=True))
    return np.stack([keys[path] for path in paths]) if paths else np.zeros((0, KEY_BYTES), np.uint8)


def _in_threads(read: Callable[[str], Any], paths: Iterable[str]) -> list[Any]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, paths))
