"""Stop signals (SIGINT, SIGTERM, SIGHUP) as exceptions.

A program runs under `handle_stop_signals`, which turns the first signal into `Stopped` and ignores later ones during
cleanup. Critical sections, such as renaming a result and its recipe, run under `defer_stop_signals`. Training installs
handlers of its own inside.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A stop signal arrived; `status` is the exit status, 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.status = number, 128 + number


class _State:
    depth = 0  # nested `defer_stop_signals` blocks
    deferred: int | None = None  # the deferred signal


@contextmanager
def handle_stop_signals() -> Iterator[None]:
    """Raises `Stopped` in the block on a stop signal; further signals are ignored while it propagates.

    Signals that were ignored before stay ignored (nohup). After `Stopped` all are ignored: the program is ending. Does
    nothing outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.getsignal(one) for one in STOPPING}
    before = {one: handler for one, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for one in before:
        signal.signal(one, _stop)
    try:
        yield
    except Stopped:
        before = dict.fromkeys(before, signal.SIG_IGN)
        raise
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def defer_stop_signals() -> Iterator[None]:
    """Defers stop signals until the end of the block."""
    if threading.current_thread() is not threading.main_thread():  # signals only interrupt the main thread
        yield
        return
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
        number = None if _State.depth else _State.deferred
        if number is not None:
            _State.deferred = None
            raise Stopped(number)


def _stop(number: int, _: Any) -> None:
    if _is_stopping(sys.exc_info()[1]):
        return
    if not _State.depth:
        raise Stopped(number)
    _State.deferred = _State.deferred or number


def _is_stopping(error: BaseException | None) -> bool:
    """Whether the exception being handled, or one in its context, is a `Stopped`."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Stopped):
            return True
        seen.add(id(error))
        error = error.__context__
    return False
