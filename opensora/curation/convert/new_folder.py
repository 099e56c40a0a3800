"""A folder that appears complete or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opensora.errors import ConfigError
from opensora.files import error_message


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `path` when the block ends, and removed if it fails.

    Raises ConfigError if `path` exists or cannot be written.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists; name another folder")
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error_message(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
