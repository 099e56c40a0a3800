"""The edge of every program: what it prints and logs, and the status with which it ends.

All that is foreign (names of files and tensors, answers of servers) is printed without control characters here, in one
place: standard output, log lines and the line of an error. Streams that are closed, full or not for every character
never end in a traceback.
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

BROKEN_PIPE = 141  # as a shell tells of SIGPIPE
QUIET = ("httpx", "httpx2", "transformers", "diffusers", "huggingface_hub")

MAX_MESSAGE = 1_500  # characters


def run_program(program: Callable[[], Any]) -> int:
    """The exit status of a program: its own number or 0; 1 after a user's error, told in one line; 128+n for signal n.

    SIGTERM is not told of: torchrun ends the other ranks by it when one has failed.
    """
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
        except KeyboardInterrupt:  # raised by something else than a signal to this thread
            sys.stderr.write("interrupted; nothing half-written was left\n")
            return 128 + signal.SIGINT
        return result if isinstance(result, int) else 0


def one_line(text: object) -> str:
    """A foreign text as one line of what a terminal may show."""
    return printable(text).replace("\n", "\\n")


def shortened(text: str) -> str:
    """A message, cut in its middle where a value in it is longer than anybody reads; its end has the remedy."""
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 500]} ... {text[-480:]}"


class _Output:
    """Standard output without control characters. Where it cannot be written to, the program ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        known = self._shown(text).encode(encoding, "backslashreplace").decode(encoding)
        self._try(lambda: self._stream.write(known))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _shown(self, text: str) -> str:
        return printable(text)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except (OSError, ValueError) as failure:  # ValueError: somebody has closed it
            self._let_go()
            self._fail(failure)

    def _let_go(self) -> None:
        """Lets what is still in the buffer go nowhere, so that the interpreter does not fail on it at its end."""
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def _fail(self, failure: Exception) -> None:
        if getattr(failure, "errno", None) == errno.EPIPE:
            raise SystemExit(BROKEN_PIPE)
        reason = getattr(failure, "strerror", None) or failure
        sys.stderr.write(f"error: standard output cannot be written to ({one_line(reason)})\n")
        raise SystemExit(1)


class _Messages(_Output):
    """Standard error, which bars of progress move on. Where it cannot be written to, the work goes on unseen."""

    def _shown(self, text: str) -> str:
        return text

    def _fail(self, failure: Exception) -> None:
        pass


@contextmanager
def _safe_streams() -> Iterator[None]:
    """Standard output and error that are there, and take every text."""
    for number in range(3):  # or the next file that is opened would become one of them
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    out, messages = (_wrapped(kind, stream) for kind, stream in ((_Output, sys.stdout), (_Messages, sys.stderr)))
    with redirect_stdout(out), redirect_stderr(messages):
        try:
            yield
        finally:
            out.flush()


def _wrapped(kind: type[_Output], stream: TextIO | None) -> Any:
    if isinstance(stream, _Output):
        return stream
    return kind(open(os.devnull, "w", encoding="utf-8") if stream is None else stream)


class _Formatter(logging.Formatter):
    """Log lines without control characters, ours as one line each."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        shown = super().formatMessage(record)
        return one_line(shown) if record.name.startswith("opensora") else shown

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def _logging() -> Iterator[None]:
    """Messages and warnings on standard error, one line each; those of noisy libraries only when they are errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for library in QUIET:
        logging.getLogger(library).setLevel(logging.ERROR)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
