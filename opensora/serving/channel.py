"""Messages between the HTTP process and its workers: JSON, one a line, over the pipes of the worker.

The end of its input tells a worker that the server is gone; it ends at once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import IO, Any, Protocol

Message = dict[str, Any]
MAX_BYTES = 32 * 2**20  # of a message


class Outbox(Protocol):
    """Where a worker's messages go."""

    def send(self, **message: Any) -> None: ...


class WorkerChannel:
    """The worker's end. Whatever else the process prints goes to standard error."""

    def __init__(self) -> None:
        self._out: IO[bytes] = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends a message; ends the process if nobody reads it."""
        line = json.dumps(message).encode() + b"\n"
        try:
            with self._lock:
                self._out.write(line)
                self._out.flush()
        except OSError:
            os._exit(1)

    def receive(self) -> Message:
        """The next message; ends the process if there is none."""
        line = sys.stdin.buffer.readline(MAX_BYTES)
        if not line:
            os._exit(1)
        message: Message = json.loads(line)
        return message

    def listen(self, handle: Callable[[Message], None]) -> None:
        """Passes every further message to `handle`, in a thread."""

        def run() -> None:
            while True:
                handle(self.receive())

        threading.Thread(target=run, name="messages", daemon=True).start()
