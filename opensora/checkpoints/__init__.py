"""Checkpoints: found, read within bounds, mapped to models, saved, converted, inspected.

May import `distributed` and what lies below it. For programs: `inspect(path)` and `convert(source, destination, to)`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opensora.checkpoints.conversion import convert
    from opensora.checkpoints.inspection import CheckpointInfo, inspect
    from opensora.checkpoints.summary import Summary

__all__ = ["CheckpointInfo", "Summary", "convert", "inspect"]

_MODULES = {"CheckpointInfo": "inspection", "Summary": "summary", "convert": "conversion", "inspect": "inspection"}


def __getattr__(name: str) -> Any:
    """Imports the names above on first use."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
