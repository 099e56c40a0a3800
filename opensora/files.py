"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from opensora.errors import MediaError, OpenSoraError


@contextmanager
def replacing(
    *paths: str | os.PathLike[str], make_folders: bool = False,
    error: type[OpenSoraError] = MediaError, failures: tuple[type[Exception], ...] = (),
) -> Iterator[list[Path]]:  # fmt: skip
    """Temporary paths to write to, renamed to `paths` when the block ends: all or none, even after Ctrl-C.

    Each exists, with the permissions of a new file, and is on the disk before it gets its name. Raises `error` where
    the operating system refuses (full disk, no permission), or on one of `failures`.
    """
    pairs = [(path.with_name(f".{os.getpid()}.{path.name}"), path) for path in map(Path, paths)]
    try:
        modes = [_create(temporary, make_folders) for temporary, _ in pairs]
        yield [temporary for temporary, _ in pairs]
        for (temporary, _), mode in zip(pairs, modes, strict=True):
            temporary.chmod(mode)  # some writers let nobody else read their files
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        try:
            for temporary, final in pairs:
                os.replace(temporary, final)
        except BaseException:
            for temporary, final in pairs:
                if not temporary.exists():
                    final.unlink(missing_ok=True)
            raise
    except (OSError, *failures) as failure:
        raise error(f"{pairs[0][1]}: cannot be written ({why(failure)})") from failure
    finally:
        for temporary, _ in pairs:
            with suppress(OSError):
                temporary.unlink()


def _create(path: Path, make_folders: bool) -> int:
    """Makes an empty file; its permissions."""
    if make_folders:
        path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path.stat().st_mode


def why(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())[:200]
