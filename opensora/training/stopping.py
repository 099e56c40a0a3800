"""Signals that ask a training to end: it saves at the end of the step, and says how to go on.

Batch systems send SIGTERM or SIGUSR1 some time before they take a machine back, terminals send SIGINT (Ctrl-C) and
SIGHUP. What is ignored already stays so, such as SIGHUP under nohup. The second signal does what it did before.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

ASKING = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")


class Stopping:
    """While it is open, `asked` is the number of the first signal that came, else 0."""

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # no other may say what a signal does
            for number in (getattr(signal, name) for name in ASKING if hasattr(signal, name)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = number
        self.__exit__()


def name_of(number: int) -> str:
    """What a signal is called."""
    return signal.Signals(number).name
