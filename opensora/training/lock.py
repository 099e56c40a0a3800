"""The lock of a run folder: one run at a time may write into it."""

from __future__ import annotations

import errno
import logging
import os
import socket
from pathlib import Path
from typing import TextIO

from opensora.config.schema import Count, Name, Schema, check
from opensora.distributed import ranks
from opensora.errors import MediaError, OpenSoraError, WeightsError, printable
from opensora.files import error_message, read_json

logger = logging.getLogger("opensora")
FILE = "run.lock"


class Holder(Schema):
    """The process that holds a lock, or held it last; `launcher` identifies the torchrun that started it."""

    host: Name
    pid: Count
    launcher: Name = ""


class Lock:
    """Locks a folder until `release` or the end of this process.

    Raises WeightsError, naming the holder, if another process has locked it. Does nothing but warn on file systems
    without locks.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / FILE
        self._file: TextIO | None = None
        try:
            import fcntl
        except ImportError:
            logger.warning("there are no file locks here: make sure that only one run at a time uses %s", folder)
            return
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise WeightsError(f"{path}: cannot be written ({error_message(error)})") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise WeightsError(f"{folder}: is already being trained{_by(folder)}; {_REMEDY}") from None
            logger.warning("%s: no locks there (%s); make sure that only one run uses it", folder, error_message(error))
            return
        self._file = file
        self._write_holder(file)

    def _write_holder(self, file: TextIO) -> None:
        own = Holder(host=socket.gethostname(), pid=os.getpid(), launcher=ranks.launch_id()[:1024])
        try:
            file.truncate(0)
            file.write(own.model_dump_json())
            file.flush()
        except OSError as error:
            raise WeightsError(f"{file.name}: cannot be written ({error_message(error)})") from error

    def release(self) -> None:
        """Unlocks the folder."""
        if self._file is not None:
            self._file.close()
        self._file = None


_REMEDY = "wait until it ends, or start a new run without --load"


def holder(folder: Path) -> Holder | None:
    """The process that holds the lock of a folder, or held it last, if known."""
    try:
        return check(Holder, read_json(folder / FILE, MediaError, 10_000))
    except OpenSoraError:
        return None


def _by(folder: Path) -> str:
    found = holder(folder)
    return printable(f", by process {found.pid} on {found.host}") if found else ""
