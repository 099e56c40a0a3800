"""Reads files from outside within limits: regular files of bounded size, bounded JSON."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from opensora.errors import MediaError, OpenSoraError

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 50
MAX_JSON_VALUES = 1_000_000
MAX_DIGITS = 40  # per number in JSON


def read_bytes(path: str | os.PathLike[str], max_bytes: int, error: type[OpenSoraError] = MediaError) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes.

    Raises `error`, which reveals nothing of the content; devices, pipes and folders are not read.
    """
    with open_bounded(path, max_bytes, error) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:  # the file grew, or its size was not known
        raise error(f"{path}: is larger than {max_bytes:,} bytes, the limit")
    return content


def open_regular(path: str | os.PathLike[str], error: type[OpenSoraError] = MediaError) -> BinaryIO:
    """Opens a regular file for reading. Raises `error` for devices, pipes and folders, OSError as `open` does."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise error(f"{path}: is not a regular file; give a file")
    return open(handle, "rb")


@contextmanager
def open_bounded(
    path: str | os.PathLike[str], max_bytes: int, error: type[OpenSoraError] = MediaError
) -> Iterator[BinaryIO]:
    """Opens a regular file of at most `max_bytes` bytes. Raises `error`, which reveals nothing of the content."""
    try:
        with open_regular(path, error) as file:
            if os.fstat(file.fileno()).st_size > max_bytes:
                raise error(f"{path}: is larger than {max_bytes:,} bytes, the limit")
            yield file
    except OpenSoraError:
        raise
    except (OSError, ValueError) as failure:
        raise error(f"{path}: cannot be read ({error_message(failure)})") from failure


def file_digest(path: str | os.PathLike[str], max_bytes: int, error: type[OpenSoraError] = MediaError) -> str:
    """The SHA-256 (hex) of a regular file of at most `max_bytes` bytes. Raises `error` as `open_bounded` does."""
    digest = hashlib.sha256()
    with open_bounded(path, max_bytes, error) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(
    path: str | os.PathLike[str], error: type[OpenSoraError] = MediaError, max_bytes: int = MAX_JSON_BYTES
) -> Any:
    """The JSON value in a regular file of at most `max_bytes` bytes, UTF-8. Raises `error` as `parse_json` does."""
    return parse_json(read_bytes(path, max_bytes, error), str(path), error, max_bytes)


def parse_json(
    text: str | bytes, where: str, error: type[OpenSoraError] = MediaError, max_bytes: int = MAX_JSON_BYTES
) -> Any:
    """Parses JSON of at most 50 levels, a million values, 40 digits per number and `max_bytes` characters.

    Raises `error`; its message begins with `where`.
    """
    if len(text) > max_bytes:
        raise error(f"{where}: holds JSON of more than {max_bytes:,} characters, the limit")

    def number(kind: type) -> Any:
        def read(digits: str) -> Any:
            if len(digits) > MAX_DIGITS:
                raise ValueError(f"a number of {len(digits)} digits")
            return kind(digits)

        return read

    def refuse(name: str) -> Any:
        raise ValueError(f"{name}, which is not valid JSON")

    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, parse_int=number(int), parse_float=number(float), parse_constant=refuse)
        _check_bounds(value)
    except RecursionError:
        raise error(f"{where}: cannot be read as JSON (nested more than {MAX_JSON_DEPTH} levels deep)") from None
    except ValueError as failure:
        raise error(f"{where}: cannot be read as JSON ({error_message(failure)})") from None
    return value


def _check_bounds(value: Any) -> None:
    """Raises ValueError for too many values, RecursionError for too deep nesting."""
    level, values = [value], 0
    for _ in range(MAX_JSON_DEPTH):
        values += len(level)
        if values > MAX_JSON_VALUES:
            raise ValueError(f"more than {MAX_JSON_VALUES:,} values")
        below = [one for one in level if isinstance(one, list | dict)]
        level = [item for one in below for item in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return
    raise RecursionError


def check_file_name(name: object, where: str, error: type[OpenSoraError] = MediaError) -> str:
    """Returns `name` if it is a plain file name. Raises `error` for paths, hidden names and control characters."""
    text = str(name)
    fits = name == text and text.isprintable() and 0 < len(text.encode(errors="replace")) <= 255
    if not fits or text.startswith(".") or not text == PurePosixPath(text).name == PureWindowsPath(text).name:
        raise error(f"{where}: {text[:80]!r} is not a plain file name; refused")
    return text


def error_message(error: BaseException) -> str:
    """The message of an exception on one line."""
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())[:200]
