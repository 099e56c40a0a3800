"""A time limit for a whole network exchange, however slowly the other side answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def call_with_timeout(work: Callable[[], T], seconds: float) -> T:
    """Returns `work()`, or raises TimeoutError after `seconds` and abandons the thread that runs it.

    Socket timeouts bound a single read only: a server that sends a byte at a time never exceeds them.
    """
    outcome: list[T | Exception] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    result = outcome[0] if outcome else TimeoutError(f"takes longer than {seconds:.0f} s")
    if isinstance(result, Exception):
        raise result
    return result
