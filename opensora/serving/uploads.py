"""Uploaded images and videos: stored under names of our own, and opened by the planner before they are used."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import IO, Any

from opensora.errors import printable
from opensora.serving import folders
from opensora.serving.errors import ApiError, not_found
from opensora.serving.job import COMPLETED
from opensora.serving.limits import Limits
from opensora.serving.planner import Planner
from opensora.serving.store import Store, StoredFile

# (offset, first bytes) -> suffix
_KINDS = (
    (0, b"\x89PNG\r\n\x1a\n", ".png"), (0, b"\xff\xd8\xff", ".jpg"), (8, b"WEBP", ".webp"), (0, b"GIF8", ".gif"),
    (4, b"ftyp", ".mp4"), (0, b"\x1aE\xdf\xa3", ".mkv"), (8, b"AVI ", ".avi"),
)  # fmt: skip
_DATA_URL = re.compile(r"data:[a-z]+/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_ID = re.compile(r"(?:file|video)_[0-9a-f]{24}(#(first|last|hold)=[1-9][0-9]{0,3})?")
MAX_NAME = 200  # characters of the name that a client gave a file


def new_id(kind: str) -> str:
    """An id that cannot be guessed."""
    return f"{kind}_{secrets.token_hex(12)}"


class Uploads:
    """Takes media of requests; what is stored can be opened."""

    def __init__(self, store: Store, planner: Planner, limits: Limits) -> None:
        self.store, self.planner, self.limits = store, planner, limits

    async def save(self, owner: str, name: str, file: IO[bytes]) -> StoredFile:
        """Stores an upload (an open file). Raises ApiError for one that is no image or video."""
        if self.store.count_files(owner) >= self.limits.max_stored_files:
            raise ApiError(429, "too many files are stored; delete some", code="too_many_files", retry_after=60)
        if self.store.disk_use() > self.limits.max_disk:
            raise ApiError(507, "the disk of the server is full; delete results", code="disk_full")
        file.seek(0)
        suffix = _suffix(file.read(16))
        file.seek(0)
        id = new_id("file")
        stored = StoredFile(id, owner, printable(name)[:MAX_NAME], suffix, 0, 0, time.time())
        path = self.store.folder / stored.path
        path.parent.mkdir(exist_ok=True)
        try:
            size = await asyncio.to_thread(_copy, file, path)
            answer = await self.planner.ask(probe=stored.path, max_frames=self.limits.max_upload_frames)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        stored = stored._replace(bytes=size, frames=answer["frames"])
        self.store.add_file(stored)
        return stored

    def delete(self, file: StoredFile) -> None:
        """Deletes an upload."""
        self.store.delete_file(file.id)
        (self.store.folder / file.path).unlink(missing_ok=True)

    async def media_of(self, owner: str, value: Any, param: str) -> str:
        """The id of a medium: of an upload in the request, a data URL, or an id, which may end in #hold=17.

        Raises ApiError for anything else: paths and addresses are never read.
        """
        if hasattr(value, "read"):
            return (await self.save(owner, value.filename or param, value.file)).id
        if isinstance(value, dict):  # as OpenAI writes them
            value = value.get("file_id") or value.get("id") or value.get("image_url")
        if not isinstance(value, str):
            raise ApiError(400, f"{param} must be a file, or the id of one", param=param, code="invalid_value")
        if match := _DATA_URL.match(value):
            return (await self.save(owner, param, _decoded(value[match.end() :], param))).id
        if not _ID.fullmatch(value):
            problem = f"{param} is {printable(value)[:80]!r}; upload a file, or give the id of an upload or a video"
            raise ApiError(400, f"{problem}: the server reads no paths or addresses", param=param, code="invalid_value")
        self.frames(owner, value)
        return value

    def frames(self, owner: str, entry: str) -> int:
        """The frames of an upload or result of this owner. Raises ApiError 404 for another id."""
        id = entry.partition("#")[0]
        if file := self.store.file(id, owner):
            return file.frames
        job = self.store.get(id, owner)
        if job is None:
            raise not_found("file", id)
        if job.status != COMPLETED or job.draft:
            raise ApiError(409, f"video '{id}' is not finished", code="not_ready")
        return job.num_frames

    def path(self, entry: str) -> str:
        """The path of an upload or result, below the data folder."""
        id = entry.partition("#")[0]
        if file := self.store.file(id):
            return file.path
        job = self.store.get(id)
        if job is None:
            raise not_found("file", id)
        return str(folders.media_file(job))


def _copy(file: IO[bytes], path: Path) -> int:
    """Writes an open file to a new one; returns its size."""
    with path.open("xb") as target:
        shutil.copyfileobj(file, target, 1 << 20)
        return target.tell()


def _suffix(head: bytes) -> str:
    for offset, magic, suffix in _KINDS:
        if head[offset : offset + len(magic)] == magic:
            return suffix
    known = "PNG, JPEG, WebP, GIF, MP4, MOV, MKV, WebM or AVI"
    raise ApiError(400, f"the file is no image or video that is known here; give {known}", code="unsupported_file")


def _decoded(text: str, param: str) -> IO[bytes]:
    """An open file with the bytes of base64."""
    try:
        return io.BytesIO(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param} is a data URL that is no base64", param=param, code="invalid_value") from None
