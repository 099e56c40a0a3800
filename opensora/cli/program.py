"""The process boundary: output, logging, errors and the exit status.

Foreign text (file and tensor names, server answers) is escaped here, in one place: standard output, log lines and error
lines. A stream that is closed, full or limited to few characters never causes a traceback.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

from opensora.errors import OpenSoraError, printable
from opensora.signals import Stopped, handle_stop_signals

BROKEN_PIPE = 141  # the status that shells report for SIGPIPE
QUIET_LIBRARIES = ("httpx", "httpx2", "transformers", "huggingface_hub")

MAX_MESSAGE = 1_500  # characters


def run_program(program: Callable[[], Any]) -> int:
    """Runs a program; returns its status (0 if it returns no int), 1 after a user error, 128 + n after stop signal n.

    SIGTERM prints nothing: torchrun sends it to the other ranks when one fails.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads crawl on a busy machine
    with _safe_streams(), _logging():
        try:
            with handle_stop_signals():
                result = program()
        except OpenSoraError as error:
            sys.stderr.write(f"error: {shortened(one_line(error))}\n")  # in one write: ranks share the stream
            return 1
        except Stopped as stop:
            if stop.number != signal.SIGTERM:
                sys.stderr.write("interrupted; nothing half-written was left\n")
            return stop.status
        except KeyboardInterrupt:  # not raised by a signal to this thread
            sys.stderr.write("interrupted; nothing half-written was left\n")
            return 128 + signal.SIGINT
        return result if isinstance(result, int) else 0


def one_line(text: object) -> str:
    """Foreign text as one line without control characters."""
    return printable(text).replace("\n", "\\n")


def shortened(text: str) -> str:
    """A message with its middle cut if it is too long; the end holds the remedy."""
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 500]} ... {text[-480:]}"


class _SafeStdout:
    """Standard output without control characters. A failed write ends the program."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        known = self._escape(text).encode(encoding, "backslashreplace").decode(encoding)
        self._try(lambda: self._stream.write(known))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _escape(self, text: str) -> str:
        return printable(text)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except (OSError, ValueError) as failure:  # ValueError: somebody has closed it
            self._discard_buffer()
            self._fail(failure)

    def _discard_buffer(self) -> None:
        """Redirects the buffered rest to the null device, so that the interpreter does not fail when it exits."""
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def _fail(self, failure: Exception) -> None:
        if getattr(failure, "errno", None) == errno.EPIPE:
            raise SystemExit(BROKEN_PIPE)
        reason = getattr(failure, "strerror", None) or failure
        sys.stderr.write(f"error: standard output cannot be written to ({one_line(reason)})\n")
        raise SystemExit(1)


class _SafeStderr(_SafeStdout):
    """Standard error, with control characters for progress bars. A failed write is ignored."""

    def _escape(self, text: str) -> str:
        return text

    def _fail(self, failure: Exception) -> None:
        pass


@contextmanager
def _safe_streams() -> Iterator[None]:
    """Replaces standard output and error by streams that are open and accept any text."""
    for number in range(3):  # otherwise the next opened file would take its number
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    out, messages = (_wrapped(kind, stream) for kind, stream in ((_SafeStdout, sys.stdout), (_SafeStderr, sys.stderr)))
    with redirect_stdout(out), redirect_stderr(messages):
        try:
            yield
        finally:
            out.flush()


def _wrapped(kind: type[_SafeStdout], stream: TextIO | None) -> Any:
    if isinstance(stream, _SafeStdout):
        return stream
    return kind(open(os.devnull, "w", encoding="utf-8") if stream is None else stream)


class _Formatter(logging.Formatter):
    """Log lines without control characters; those of this package stay one line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        shown = super().formatMessage(record)
        return one_line(shown) if record.name.startswith("opensora") else shown

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def _logging() -> Iterator[None]:
    """Logs to standard error: messages and warnings, but only errors of noisy libraries."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for library in QUIET_LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
