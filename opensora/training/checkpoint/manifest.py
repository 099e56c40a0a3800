"""The manifest of a checkpoint: the SHA-256 of each of its files, and the run that wrote it.

Its path is `optimizer/manifest.json`, so that the checkpoint folder holds only the documented entries.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from pydantic import Field

from opensora.config.schema import MAX_TEXT, Name, NonNegative, Schema, Sha256, check
from opensora.errors import WeightsError
from opensora.files import read_bytes, read_json

FILE = Path("optimizer") / "manifest.json"
CHUNK = 2**22  # bytes read at a time
RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
REMEDY = "it is damaged; try an older checkpoint"


class Manifest(Schema):
    """`saved` is a Unix time in seconds; `files` has the hash of each file by its path in the checkpoint."""

    run: RunId | None
    saved: NonNegative
    files: dict[Name, Sha256]


def write(folder: Path, run: str | None) -> None:
    """Writes the manifest of a checkpoint whose other files are complete."""
    files = {name: _hash(folder / name) for name in _names(folder)}
    manifest = Manifest(run=run, saved=float(int(time.time())), files=files)
    (folder / FILE).write_text(_text(manifest), encoding="utf-8")


def read(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint; None if an earlier version wrote it without. Raises WeightsError if damaged."""
    path = folder / FILE
    if not path.is_file():
        return None
    manifest = check(Manifest, read_json(path, WeightsError), str(path), WeightsError, REMEDY)
    if read_bytes(path, 16 * MAX_TEXT, WeightsError) != _text(manifest).encode():
        raise WeightsError(f"{path}: was changed after it was written; {REMEDY}")
    return manifest


def verify(folder: Path) -> bool:
    """Verifies the hashes of a checkpoint; False if it has none. Raises WeightsError naming a damaged file."""
    manifest = read(folder)
    if manifest is None:
        return False
    if absent := sorted(name for name in manifest.files if not (folder / name).is_file()):
        raise WeightsError(f"{folder / absent[0]}: is missing; {REMEDY}")
    names = [name for name in _names(folder) if name in manifest.files]  # nothing outside of the folder
    with ThreadPoolExecutor(4) as pool:
        for name, found in zip(names, pool.map(lambda name: _hash(folder / name), names), strict=True):
            if found != manifest.files[name]:
                raise WeightsError(f"{folder / name}: has changed (its SHA-256 differs); {REMEDY}")
    return True


def run_of(folder: Path) -> str | None:
    """The id of the run that wrote a checkpoint, or None."""
    try:
        manifest = read(folder)
    except WeightsError:
        return None
    return None if manifest is None else manifest.run


def _names(folder: Path) -> Iterator[str]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / FILE)
    return (path.relative_to(folder).as_posix() for path in paths)


def _text(manifest: Manifest) -> str:
    return json.dumps(manifest.model_dump(), indent=1) + "\n"


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(CHUNK):
                digest.update(part)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    return digest.hexdigest()
