"""Stop signals, handled alike: the first one ends the work as an exception, none disturbs what is put in order then.

A program runs under `stoppable`. What must not be torn apart, such as the renames of a result and its recipe, runs
under `held`. A part that has its own answer to a signal, such as a checkpoint, sets a handler of its own within.
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
    """A stop signal came. `status` is the exit status that tells which."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.status = number, 128 + number


class _State:
    depth = 0  # of blocks under `held`
    waiting: int | None = None  # the signal that came meanwhile


@contextmanager
def stoppable() -> Iterator[None]:
    """Raises `Stopped` in the block at a stop signal; more of them are ignored while that is on its way.

    Signals that were ignored before stay so (nohup). After a `Stopped` all are ignored: the program is about to end.
    Outside of the main thread nothing changes.
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
def held() -> Iterator[None]:
    """Keeps a stop signal waiting until the block has ended."""
    if threading.current_thread() is not threading.main_thread():  # signals never end another thread
        yield
        return
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
        number = None if _State.depth else _State.waiting
        if number is not None:
            _State.waiting = None
            raise Stopped(number)


def _stop(number: int, _: Any) -> None:
    if _is_stopping(sys.exc_info()[1]):
        return
    if not _State.depth:
        raise Stopped(number)
    _State.waiting = _State.waiting or number


def _is_stopping(error: BaseException | None) -> bool:
    """Whether the error that is being handled, or one that was on its way before it, is a `Stopped`."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Stopped):
            return True
        seen.add(id(error))
        error = error.__context__
    return False
