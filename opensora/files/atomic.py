"""Writes files atomically: all of them appear under their names, or none."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from opensora.errors import MediaError, OpenSoraError
from opensora.files.reading import error_message
from opensora.signals import defer_stop_signals


@contextmanager
def atomic_write(
    *paths: str | os.PathLike[str], make_folders: bool = False,
    error: type[OpenSoraError] = MediaError, failures: tuple[type[Exception], ...] = (),
) -> Iterator[list[Path]]:  # fmt: skip
    """Yields temporary paths that are renamed to `paths` when the block ends: all or none, even on Ctrl-C.

    Existing files stay until everything is written, and are restored if a rename fails. The temporary files exist, with
    default permissions, and are synced to disk before the rename. Raises `error` if the operating system refuses (full
    disk, no permission), or on one of `failures`.
    """
    pairs = _with_temporaries(paths)
    with _cleared(pairs, error, failures):
        modes = [_create(temporary, make_folders) for temporary, _ in pairs]
        yield [temporary for temporary, _ in pairs]
        _sync(pairs, modes)
        with defer_stop_signals():
            _rename_all(pairs)


@contextmanager
def atomic_create(
    *paths: str | os.PathLike[str], others: Iterable[Sequence[Path]] = (), error: type[OpenSoraError] = MediaError
) -> Iterator[tuple[list[Path], list[Path]]]:
    """Yields temporary paths, and a list that holds their final paths after the block.

    The final paths are `paths`, or the first of `others` that are all free. Nothing is ever replaced, even if several
    processes write into one folder; all files appear, or none. Raises `error` as `atomic_write` does, or if no name is
    free.
    """
    pairs = _with_temporaries(paths)
    names: list[Path] = []
    with _cleared(pairs, error):
        modes = [_create(temporary, False) for temporary, _ in pairs]
        yield [temporary for temporary, _ in pairs], names
        _sync(pairs, modes)
        for choice in chain([[final for _, final in pairs]], others):
            names[:] = choice
            with defer_stop_signals():
                if _link_all([(temporary, final) for (temporary, _), final in zip(pairs, choice, strict=True)]):
                    return
        raise error(f"{pairs[0][1]}: it or a file that belongs to it already exists; nothing was replaced")


def _with_temporaries(paths: Iterable[str | os.PathLike[str]]) -> list[tuple[Path, Path]]:
    """(unique hidden temporary path, final path) for each path."""
    return [(path.with_name(f".{secrets.token_hex(4)}.{path.name}"), path) for path in map(Path, paths)]


@contextmanager
def _cleared(
    pairs: list[tuple[Path, Path]], error: type[OpenSoraError], failures: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Removes the temporary files at the end; turns OSError and `failures` into `error`."""
    caught: tuple[type[Exception], ...] = (OSError, *failures)
    try:
        yield
    except caught as failure:
        raise error(f"{pairs[0][1]}: cannot be written ({error_message(failure)})") from failure
    finally:
        with defer_stop_signals():
            _clear(pairs)


def _clear(pairs: list[tuple[Path, Path]]) -> None:
    """Removes temporary files, and backups that have been replaced or restored."""
    renamed = not any(os.path.lexists(temporary) for temporary, _ in pairs)
    for temporary, final in pairs:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        with suppress(OSError):
            if renamed or _is_same(_backup(temporary), final):
                _backup(temporary).unlink(missing_ok=True)


def _create(path: Path, make_folders: bool) -> int:
    """Creates an empty file and returns its mode."""
    if make_folders:
        path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path.stat().st_mode


def _sync(pairs: list[tuple[Path, Path]], modes: list[int]) -> None:
    """Syncs the written files to disk and resets their modes."""
    for (temporary, _), mode in zip(pairs, modes, strict=True):
        temporary.chmod(mode)  # some writers restrict the mode
        with temporary.open("rb") as written:
            os.fsync(written.fileno())


def _rename_all(pairs: list[tuple[Path, Path]]) -> None:
    """Renames all files; if one rename fails, restores every final path.

    The progress is read from the file system only, so that an exception at any line can be rolled back.
    """
    try:
        for temporary, final in pairs:
            if final.is_file() or final.is_symlink():
                _make_backup(final, _backup(temporary))
            os.replace(temporary, final)
    except BaseException:
        for temporary, final in pairs:
            if os.path.lexists(_backup(temporary)):
                if not _is_same(_backup(temporary), final):
                    os.replace(_backup(temporary), final)
            elif not os.path.lexists(temporary) and final.is_file():
                final.unlink()
        raise


def _backup(temporary: Path) -> Path:
    """The backup path of an existing file during the renames."""
    return temporary.with_name(f"{temporary.name}.old")


def _make_backup(final: Path, kept: Path) -> None:
    """Links a file to its backup path, or moves it where hard links are not supported."""
    try:
        os.link(final, kept, follow_symlinks=False)
    except (OSError, NotImplementedError):
        os.replace(final, kept)


def _link_all(pairs: list[tuple[Path, Path]]) -> bool:
    """Links all files to their final paths; undoes all and returns False if a path is taken."""
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
    """Links a file to a free path. Raises FileExistsError if the path is taken."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):  # hard links are not supported
        os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            os.replace(temporary, final)
        except BaseException:
            if os.path.lexists(temporary):
                final.unlink()
            raise


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths are the same file."""
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except OSError:
        return False
