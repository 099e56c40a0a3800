"""Files from outside, read within bounds; files of ours, which appear whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from opensora.errors import MediaError, OpenSoraError
from opensora.signals import held

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 50
MAX_JSON_VALUES = 1_000_000
MAX_DIGITS = 40  # of a number in JSON


def read_bytes(path: str | os.PathLike[str], most: int, error: type[OpenSoraError] = MediaError) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Devices, pipes and folders are refused without being read. Raises `error`, which says nothing of the content.
    """
    try:
        with open_regular(path, error) as file:
            content = file.read(most + 1)
    except error:
        raise
    except (OSError, ValueError) as failure:
        raise error(f"{path}: cannot be read ({why(failure)})") from failure
    if len(content) > most:
        raise error(f"{path}: is larger than {most:,} bytes, the limit here")
    return content


def open_regular(path: str | os.PathLike[str], error: type[OpenSoraError] = MediaError) -> BinaryIO:
    """A regular file, opened for reading. Devices, pipes and folders raise `error` unread; OSError as from `open`."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise error(f"{path}: is no regular file; give a file")
    return open(handle, "rb")


def read_json(path: str | os.PathLike[str], error: type[OpenSoraError] = MediaError, most: int = MAX_JSON_BYTES) -> Any:
    """The JSON value in a regular file of at most `most` bytes, UTF-8. Raises `error` as `parse_json` does."""
    return parse_json(read_bytes(path, most, error), str(path), error)


def parse_json(text: str | bytes, where: str, error: type[OpenSoraError] = MediaError) -> Any:
    """The value that JSON text holds: at most 50 levels deep and a million values, no number of over 40 digits.

    Raises `error`, which `where` opens.
    """

    def number(kind: type) -> Any:
        def read(digits: str) -> Any:
            if len(digits) > MAX_DIGITS:
                raise ValueError(f"a number of {len(digits)} digits")
            return kind(digits)

        return read

    def refuse(name: str) -> Any:
        raise ValueError(f"{name}, which JSON does not know")

    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, parse_int=number(int), parse_float=number(float), parse_constant=refuse)
        _count(value)
    except RecursionError:
        raise error(f"{where}: cannot be read as JSON (nested more than {MAX_JSON_DEPTH} levels deep)") from None
    except ValueError as failure:
        raise error(f"{where}: cannot be read as JSON ({why(failure)})") from None
    return value


def _count(value: Any) -> None:
    """Raises ValueError or RecursionError for a value out of bounds."""
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


def plain_name(name: object, where: str, error: type[OpenSoraError] = MediaError) -> str:
    """`name`, if it names a file in a folder and nothing else. Raises `error` for a path, a hidden name, a control."""
    plain = isinstance(name, str) and name.isprintable() and 0 < len(name.encode(errors="replace")) <= 255
    kinds = (PurePosixPath, PureWindowsPath)
    if not plain or name.startswith(".") or any(kind(name).name != name for kind in kinds):
        raise error(f"{where}: {str(name)[:80]!r} is no plain file name; refused")
    return name


@contextmanager
def replacing(
    *paths: str | os.PathLike[str], make_folders: bool = False,
    error: type[OpenSoraError] = MediaError, failures: tuple[type[Exception], ...] = (),
) -> Iterator[list[Path]]:  # fmt: skip
    """Temporary paths to write to, renamed to `paths` when the block ends: all or none, even after Ctrl-C.

    What lay at `paths` before stays there until all of it is written, and comes back if one rename fails. Each path
    exists, with the permissions of a new file, and is on the disk before it gets its name. Raises `error` where the
    operating system refuses (full disk, no permission), or on one of `failures`.
    """
    pairs = [(path.with_name(f".{os.getpid()}.{path.name}"), path) for path in map(Path, paths)]
    try:
        modes = [_create(temporary, make_folders) for temporary, _ in pairs]
        yield [temporary for temporary, _ in pairs]
        for (temporary, _), mode in zip(pairs, modes, strict=True):
            temporary.chmod(mode)  # some writers let nobody else read their files
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        with held():
            _rename_all(pairs)
    except (OSError, *failures) as failure:
        raise error(f"{pairs[0][1]}: cannot be written ({why(failure)})") from failure
    finally:
        with held():
            for temporary, _ in pairs:
                with suppress(OSError):
                    temporary.unlink()


def _rename_all(pairs: list[tuple[Path, Path]]) -> None:
    """Gives each file its name. When one cannot get it, all names lead to what they led to before."""
    done: list[tuple[Path, Path]] = []  # where the old file is kept, its name
    try:
        for temporary, final in pairs:
            kept = final.with_name(f".{os.getpid()}.{final.name}.old")
            if final.is_file() or final.is_symlink():
                os.replace(final, kept)
            done.append((kept, final))
            os.replace(temporary, final)
    except BaseException:
        for kept, final in done:
            if os.path.lexists(kept):
                os.replace(kept, final)
            elif final.is_file():
                final.unlink()
        raise
    for kept, _ in done:
        with suppress(OSError):
            kept.unlink(missing_ok=True)


def _create(path: Path, make_folders: bool) -> int:
    """Makes an empty file; its permissions."""
    if make_folders:
        path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path.stat().st_mode


def why(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())[:200]
