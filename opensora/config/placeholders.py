"""MMEngine's placeholders in configuration strings, such as `{{ fileDirname }}`."""

from __future__ import annotations

import re
from pathlib import Path

from opensora.errors import did_you_mean

_PLACEHOLDER = re.compile(r"\{\{\s*(\w[\w.]*)\s*\}\}")
_ENVIRONMENT = re.compile(r"\{\{\s*['\"]?\s*\$\s*(\w+)")


def expand_placeholders(text: str, path: Path) -> str:
    """Replaces the placeholders of the configuration at `path`. Raises ValueError for an unsupported placeholder.

    Other text in double braces stays unchanged.
    """
    if (variable := find_environment_variable(text)) is not None:
        raise ValueError(f"'{{{{${variable}}}}}' reads the environment, which needs --trust-config")
    known = _values(path)

    def value(found: re.Match) -> str:
        name = found[1]
        if name.startswith("_base_."):
            raise ValueError(f"'{found[0]}' reads a value of _base_, which needs --trust-config")
        if name not in known and name.lower().startswith("file"):
            raise ValueError(f"'{found[0]}' is not known{did_you_mean(name, known)}")
        return known.get(name, found[0])

    return _PLACEHOLDER.sub(value, text)


def find_environment_variable(text: str) -> str | None:
    """The variable of the first `{{$VAR:default}}` in a text, or None."""
    found = _ENVIRONMENT.search(text)
    return found[1] if found else None


def _values(path: Path) -> dict[str, str]:
    path = path.absolute()
    return {
        "fileDirname": path.parent.as_posix(), "fileBasename": path.name,
        "fileBasenameNoExtension": path.stem, "fileExtname": path.suffix,
    }  # fmt: skip
