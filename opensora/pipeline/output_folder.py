"""The folder of the results: checked before long work, and removed again if it stays empty."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from opensora.errors import MediaError
from opensora.signals import defer_stop_signals


def check_folder(path: str | Path) -> Path:
    """Creates the folder and writes a temporary file to it, before long work. Raises MediaError where that fails."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        reason = error.strerror or error
        raise MediaError(f"{folder}: outputs cannot be saved there ({reason}); choose another --save-dir") from error
    return folder


@contextmanager
def output_folder(path: str | Path) -> Iterator[None]:
    """`check_folder` at the start; at the end, folders that it created and that are still empty are removed."""
    folder = Path(path)
    created = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        check_folder(folder)
        yield
    finally:
        with defer_stop_signals():
            for part in created:
                with suppress(OSError):
                    part.rmdir()
