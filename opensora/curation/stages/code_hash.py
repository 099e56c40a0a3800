"""The hash of the code behind a stage."""

from __future__ import annotations

import ast
import hashlib
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "opensora.curation."


@cache
def code_hash(module: str) -> str:
    """The SHA-256 of the sources of a module and of all modules of opensora.curation that it reaches by imports.

    Returns its first 16 digits. Imports within functions count.
    """
    sources: dict[str, bytes] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        file = None if name in sources else source_file(name)
        if file is not None:
            sources[name] = file.read_bytes()
            todo += sorted(_imported(sources[name]))
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(f"{name}\0{len(sources[name])}\0".encode() + sources[name])
    return digest.hexdigest()[:16]


def source_file(module: str) -> Path | None:
    """The file of a module; None for a name in a module, such as a class."""
    loaded = sys.modules.get(module)
    if loaded is not None and getattr(loaded, "__file__", None):
        return Path(str(loaded.__file__))
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


def _imported(source: bytes) -> set[str]:
    """The modules of the package that a source imports, and the names that it imports from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    return {name for name in names if name.startswith(PACKAGE)}
