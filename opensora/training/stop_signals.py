"""Signals that ask a training run to stop: it saves at the end of the step.

Batch systems send SIGTERM or SIGUSR1 before they take a machine back, terminals send SIGINT (Ctrl-C) and SIGHUP.
Ignored signals stay ignored, such as SIGHUP under nohup. The second signal has its previous effect.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

STOP_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")


class StopSignals:
    """While entered, `received` is the number of the first signal that arrived, else 0."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in (getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self.__exit__()


def signal_name(number: int) -> str:
    """The name of a signal, such as SIGTERM."""
    return signal.Signals(number).name
