"""Files from outside, read within bounds; files of ours, which appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
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
    with opened(path, most, error) as file:
        content = file.read(most + 1)
    if len(content) > most:  # it grew, or lies where sizes are not known beforehand
        raise error(f"{path}: is larger than {most:,} bytes, the limit here")
    return content


def open_regular(path: str | os.PathLike[str], error: type[OpenSoraError] = MediaError) -> BinaryIO:
    """A regular file, opened for reading. Devices, pipes and folders raise `error` unread; OSError as from `open`."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise error(f"{path}: is no regular file; give a file")
    return open(handle, "rb")


@contextmanager
def opened(path: str | os.PathLike[str], most: int, error: type[OpenSoraError] = MediaError) -> Iterator[BinaryIO]:
    """A regular file of at most `most` bytes, to read from.

    Devices, pipes, folders and larger files are refused at once. Raises `error`, which says nothing of the content.
    """
    try:
        with open_regular(path, error) as file:
            if os.fstat(file.fileno()).st_size > most:
                raise error(f"{path}: is larger than {most:,} bytes, the limit here")
            yield file
    except OpenSoraError:
        raise
    except (OSError, ValueError) as failure:
        raise error(f"{path}: cannot be read ({why(failure)})") from failure


def file_digest(path: str | os.PathLike[str], most: int, error: type[OpenSoraError] = MediaError) -> str:
    """The SHA-256, in hexadecimal, of a regular file of at most `most` bytes. Raises `error` as `opened` does."""
    digest = hashlib.sha256()
    with opened(path, most, error) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: str | os.PathLike[str], error: type[OpenSoraError] = MediaError, most: int = MAX_JSON_BYTES) -> Any:
    """The JSON value in a regular file of at most `most` bytes, UTF-8. Raises `error` as `parse_json` does."""
    return parse_json(read_bytes(path, most, error), str(path), error, most)


def parse_json(
    text: str | bytes, where: str, error: type[OpenSoraError] = MediaError, most: int = MAX_JSON_BYTES
) -> Any:
    """The value that JSON text holds: at most 50 levels deep and a million values, no number of over 40 digits.

    Raises `error`, which `where` opens, also for a text that is longer than `most`.
    """
    if len(text) > most:
        raise error(f"{where}: holds JSON of more than {most:,} characters, the limit here")

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
    pairs = _with_temporaries(paths)
    with _cleared(pairs, error, failures):
        modes = [_create(temporary, make_folders) for temporary, _ in pairs]
        yield [temporary for temporary, _ in pairs]
        _settle(pairs, modes)
        with held():
            _rename_all(pairs)


@contextmanager
def adding(
    *paths: str | os.PathLike[str], others: Iterable[Sequence[Path]] = (), error: type[OpenSoraError] = MediaError
) -> Iterator[tuple[list[Path], list[Path]]]:
    """Temporary paths to write to, and a list that tells after the block what they have become.

    They become `paths`, or the first of the `others` that are all free: nothing is ever replaced, also where several
    processes add to one folder. All appear, or none. Raises `error` as `replacing` does, and where no choice is free.
    """
    pairs, names = _with_temporaries(paths), []
    with _cleared(pairs, error):
        modes = [_create(temporary, False) for temporary, _ in pairs]
        yield [temporary for temporary, _ in pairs], names
        _settle(pairs, modes)
        for choice in chain([[final for _, final in pairs]], others):
            names[:] = choice
            with held():
                if _link_all([(temporary, final) for (temporary, _), final in zip(pairs, choice, strict=True)]):
                    return
        raise error(f"{pairs[0][1]}: it, or what belongs to it, is there already; nothing was replaced")


def _with_temporaries(paths: Iterable[str | os.PathLike[str]]) -> list[tuple[Path, Path]]:
    """(hidden name that nobody else has, path) of each path."""
    return [(path.with_name(f".{secrets.token_hex(4)}.{path.name}"), path) for path in map(Path, paths)]


@contextmanager
def _cleared(
    pairs: list[tuple[Path, Path]], error: type[OpenSoraError], failures: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Removes the temporary files at the end; what the operating system refuses becomes `error`."""
    try:
        yield
    except (OSError, *failures) as failure:
        raise error(f"{pairs[0][1]}: cannot be written ({why(failure)})") from failure
    finally:
        with held():
            _clear(pairs)


def _clear(pairs: list[tuple[Path, Path]]) -> None:
    """Removes temporary files, and old ones that have been replaced or are back in their place."""
    renamed = not any(os.path.lexists(temporary) for temporary, _ in pairs)
    for temporary, final in pairs:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        with suppress(OSError):
            if renamed or _is_same(_kept(temporary), final):
                _kept(temporary).unlink(missing_ok=True)


def _create(path: Path, make_folders: bool) -> int:
    """Makes an empty file; its permissions."""
    if make_folders:
        path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path.stat().st_mode


def _settle(pairs: list[tuple[Path, Path]], modes: list[int]) -> None:
    """Brings what was written to the disk."""
    for (temporary, _), mode in zip(pairs, modes, strict=True):
        temporary.chmod(mode)  # some writers let nobody else read their files
        with temporary.open("rb") as written:
            os.fsync(written.fileno())


def _rename_all(pairs: list[tuple[Path, Path]]) -> None:
    """Gives each file its name. When one cannot get it, all names lead to what they led to before.

    What has been done is read from the disk alone, so that an exception at any line leaves nothing half done.
    """
    try:
        for temporary, final in pairs:
            if final.is_file() or final.is_symlink():
                _keep(final, _kept(temporary))
            os.replace(temporary, final)
    except BaseException:
        for temporary, final in pairs:
            if os.path.lexists(_kept(temporary)):
                if not _is_same(_kept(temporary), final):
                    os.replace(_kept(temporary), final)
            elif not os.path.lexists(temporary) and final.is_file():
                final.unlink()
        raise


def _kept(temporary: Path) -> Path:
    """Where the old file is kept until all new ones have their names."""
    return temporary.with_name(f"{temporary.name}.old")


def _keep(final: Path, kept: Path) -> None:
    """Gives a file a second name, or that name alone where a file cannot have two."""
    try:
        os.link(final, kept, follow_symlinks=False)
    except (OSError, NotImplementedError):
        os.replace(final, kept)


def _link_all(pairs: list[tuple[Path, Path]]) -> bool:
    """Gives each file a second name, or none of them and False where a name is taken."""
    try:
        for temporary, final in pairs:
            _link(temporary, final)
        return True
    except BaseException as failure:
        for temporary, final in pairs:
            if _is_same(temporary, final):
                final.unlink()
            elif not os.path.lexists(temporary):
                os.replace(final, temporary)
        if isinstance(failure, FileExistsError):
            return False
        raise


def _link(temporary: Path, final: Path) -> None:
    """Gives a file a name that is free; FileExistsError otherwise."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):  # a file cannot have two names there
        os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            os.replace(temporary, final)
        except BaseException:
            if os.path.lexists(temporary):
                final.unlink()
            raise


def _is_same(one: Path, other: Path) -> bool:
    """Whether two names lead to one file."""
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except OSError:
        return False


def why(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())[:200]
