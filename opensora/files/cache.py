"""The folder in which this program keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_path(*parts: str) -> Path:
    """A path in the program's cache folder, `opensora` below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "opensora", *parts).expanduser()
