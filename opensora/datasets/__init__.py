"""Images and videos in and out, tables of them, batches by size. May import `config`, `files` and `errors`.

For programs: `make_table(folder, target)` and `read_table(path)`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opensora.datasets.folder_table import TableReport, make_table
    from opensora.datasets.table import Table, read_table

__all__ = ["Table", "TableReport", "make_table", "read_table"]

_MODULES = {"Table": "table", "TableReport": "folder_table", "make_table": "folder_table", "read_table": "table"}


def __getattr__(name: str) -> Any:
    """Imports the names above on first use."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
