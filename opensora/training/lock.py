"""A folder that one run at a time may write into."""

from __future__ import annotations

import errno
import logging
import os
import socket
from pathlib import Path
from typing import Any

from opensora.config.schema import Count, Name, Schema, check
from opensora.distributed import peers
from opensora.errors import MediaError, OpenSoraError, WeightsError, printable
from opensora.files import read_json, why

logger = logging.getLogger("opensora")
FILE = "run.lock"


class Holder(Schema):
    """Who locks a folder, or was the last to; `launcher` is the torchrun that started it."""

    host: Name
    pid: Count
    launcher: Name = ""


class Lock:
    """The lock of a folder, until `release` or the end of this process; a process that is gone holds none.

    Raises WeightsError, which names the holder, when another process has it. File systems without locks go without.
    """

    def __init__(self, folder: Path) -> None:
        path, self._file = folder / FILE, None
        try:
            import fcntl
        except ImportError:
            logger.warning("there are no file locks here: see to it that one run at a time goes on in %s", folder)
            return
        try:
            file: Any = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise WeightsError(f"{path}: cannot be written ({why(error)})") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise WeightsError(f"{folder}: is being trained already{_by(folder)}; {_REMEDY}") from None
            logger.warning("%s: no locks there (%s); see to it that one run goes on in it", folder, why(error))
            return
        self._file = file
        self._tell()

    def _tell(self) -> None:
        own = Holder(host=socket.gethostname(), pid=os.getpid(), launcher=peers.launcher()[:1024])
        try:
            self._file.truncate(0)
            self._file.write(own.model_dump_json())
            self._file.flush()
        except OSError as error:
            raise WeightsError(f"{self._file.name}: cannot be written ({why(error)})") from error

    def release(self) -> None:
        """Lets others have the folder."""
        if self._file is not None:
            self._file.close()
        self._file = None


_REMEDY = "wait for its end, or begin a run of its own without --load"


def holder(folder: Path) -> Holder | None:
    """Who locks a folder, or was the last to, where that can be read."""
    try:
        return check(Holder, read_json(folder / FILE, MediaError, 10_000))
    except OpenSoraError:
        return None


def _by(folder: Path) -> str:
    found = holder(folder)
    return printable(f", by process {found.pid} on {found.host}") if found else ""
