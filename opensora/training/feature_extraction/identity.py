"""`features.json` of a features folder: what was encoded, and by which weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from opensora.checkpoints.hub import read_json
from opensora.errors import ConfigError
from opensora.files import error_message


def claim_folder(folder: Path, identity: dict[str, Any], write: bool = True) -> None:
    """Writes the identity of a new folder. Raises ConfigError if an existing folder has another one.

    Of several ranks, one should `write`.
    """
    described, text = folder / "features.json", json.dumps(identity, indent=1)
    if not described.is_file():
        if not write:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(described, text)
        except OSError as error:
            raise ConfigError(
                f"{described}: cannot be written ({error_message(error)}); name another folder"
            ) from error
    wanted = json.loads(text)
    found = {"tokenizer": wanted.get("tokenizer"), **read_json(described)}  # earlier versions did not note it
    if changed := sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key)):
        remedy = "remove it or name another features folder"
        raise ConfigError(f"{folder} was encoded with another {', '.join(changed)}; {remedy}")


def replace_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
