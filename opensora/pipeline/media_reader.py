"""Reads one reference image or video at the requested size: a local file, a URL or media in memory."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opensora.datasets.transforms import get_transform
from opensora.datasets.video import is_image, iterate_video, read_image
from opensora.errors import MediaError
from opensora.files import error_message
from opensora.pipeline.in_memory_media import InMemoryMedia
from opensora.pipeline.reference_path import MAX_FRAMES, is_in_memory, is_url
from opensora.pipeline.remote_media import check_url, fetch

MAX_PIXELS = 2**30  # of all its frames at the requested size: 12 GiB as float32
MAX_FILE_BYTES = 2**34  # of a local file


def max_frames(size: tuple[int, int]) -> int:
    """The largest number of frames of a reference at `size` (H, W)."""
    return min(MAX_FRAMES, MAX_PIXELS // (size[0] * size[1]))


class MediaReader:
    """Reads sources: `media` are those in memory, `cache` is the folder of downloads.

    `allow_private` permits URLs with private addresses.
    """

    def __init__(
        self, media: Iterable[InMemoryMedia] = (), cache: str | Path | None = None, allow_private: bool = False
    ) -> None:
        self.media = {one.name: one for one in media}
        self.cache, self.allow_private = cache, allow_private

    def read(self, source: str, size: tuple[int, int], transform: str = "resize_crop") -> Tensor:
        """All frames as float32 [3, T, H, W] in [-1, 1] at `size` (H, W). A download that cannot be decoded is deleted.

        Raises ConfigError for a URL that is refused, MediaError for a source that cannot be read.
        """
        to_size = get_transform(transform)
        limit = max_frames(size)
        if is_in_memory(source):
            media = self._in_memory(source)
            with _errors_name(source, source):
                return torch.cat([to_size(image, size) for image in _decode_in_memory(media, limit)], dim=1)
        path = self._path(source)
        try:
            with _errors_name(source, path):
                return torch.cat([to_size(image, size) for image in _decode(path, limit)], dim=1)
        except MediaError:
            if is_url(source):
                path.unlink(missing_ok=True)
                fetch.cache_clear()
            raise

    def sha256(self, source: str) -> str:
        """The hash of the bytes of a file or URL, or of the pixels of media in memory, in hexadecimal."""
        if is_in_memory(source):
            return self._in_memory(source).sha256
        digest = hashlib.sha256()
        try:
            with self._path(source).open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise MediaError(f"reference {source!r}: cannot be read ({error_message(error)}); give another") from error
        return digest.hexdigest()

    def check_url(self, url: str) -> None:
        """Raises ConfigError for a URL that is refused; its host is not contacted."""
        check_url(url, self.allow_private)

    def _path(self, source: str) -> Path:
        return fetch(source, self.cache, self.allow_private) if is_url(source) else _regular_file(source)

    def _in_memory(self, name: str) -> InMemoryMedia:
        if name not in self.media:
            remedy = "give the same array through the Python interface"
            raise MediaError(f"reference '{name}' was given as pixels in memory, which no file holds; {remedy}")
        return self.media[name]


def _decode(path: Path, limit: int) -> Iterator[np.ndarray]:
    """An image [H, W, 3], or the frames [1, H, W, 3] of a video, of which there are at most `limit`."""
    if is_image(path):
        yield read_image(path)
    else:
        yield from (frame[None] for frame in iterate_video(path, limit))


def _decode_in_memory(media: InMemoryMedia, limit: int) -> Iterator[np.ndarray]:
    """As `_decode`, for media in memory; a single frame is an image."""
    frames = media.frames
    if len(frames) > limit:
        raise MediaError(f"holds more than {limit} frames, the limit; make it shorter")
    yield from (frames[0],) if len(frames) == 1 else np.split(frames, len(frames))


@contextmanager
def _errors_name(source: str, path: str | Path) -> Iterator[None]:
    """Errors in the block name `source` instead of `path`."""
    try:
        yield
    except MediaError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise MediaError(f"reference {source!r}: {reason}" + ("" if ";" in reason else "; give another")) from error


def _regular_file(source: str) -> Path:
    """The path of a local file. Raises MediaError for a missing or huge one, and for a folder, device or pipe."""
    try:
        found = os.stat(source)
    except PermissionError as error:
        raise MediaError(f"reference {source!r}: cannot be read ({error_message(error)}); give another") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise MediaError(f"reference {source!r}: no such file; give another") from error
    if not stat.S_ISREG(found.st_mode):
        raise MediaError(f"reference {source!r}: no such file, but a folder, device or pipe; give an image or a video")
    if found.st_size > MAX_FILE_BYTES:
        raise MediaError(f"reference {source!r}: is larger than {MAX_FILE_BYTES:,} bytes; cut out what is needed")
    return Path(source)
