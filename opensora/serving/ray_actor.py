"""A worker on any machine of a Ray cluster: an actor that holds the loaded models. It sees no file of the server.

What a job needs comes with its message, as bytes, into a folder of the actor; states of the sampler and results go back
the same way.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, TypeAlias

from opensora import __version__
from opensora.serving import folders
from opensora.serving.channel import Message
from opensora.serving.models import Models

Files: TypeAlias = dict[str, bytes]  # path below the data folder -> content
RECEIVE_SECONDS = 5.0  # that `receive` waits for a message


class FileOutbox:
    """Messages for the server, with the files that belong to them."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Message, Files]] = queue.SimpleQueue()

    def send(self, **message: Any) -> None:
        """Appends a message; a result that is sent is deleted here."""
        files: Files = {}
        if message["type"] == "saved":
            files = _read(folders.folder_of(message["id"]) / folders.STATE)
        elif message["type"] == "done":
            files = _read(*folders.folder_of(message["id"]).iterdir())
        elif message["type"] == "idle":
            for name in (folders.VIDEOS, folders.FILES):
                shutil.rmtree(name, ignore_errors=True)
        self._waiting.put((message, files))

    def take(self) -> list[tuple[Message, Files]]:
        """All messages that wait; none after RECEIVE_SECONDS without one."""
        found = []
        try:
            found.append(self._waiting.get(timeout=RECEIVE_SECONDS))
            while True:
                found.append(self._waiting.get_nowait())
        except queue.Empty:
            return found


class WorkerActor:
    """The actor: `deliver` and `receive` run beside the thread that computes."""

    def __init__(self, models: Models) -> None:
        from opensora.serving.runner import Runner  # torch, which the server's side does not need
        from opensora.serving.worker import Worker

        logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="worker: %(message)s")
        os.chdir(tempfile.mkdtemp(prefix="opensora-worker-"))
        self._outbox = FileOutbox()
        self._worker = Worker(self._outbox, Runner(self._outbox, models, None))
        threading.Thread(target=self._run, name="worker", daemon=True).start()

    def version(self) -> str:
        """That of opensora on this machine."""
        return __version__

    def deliver(self, message: Message, files: Files) -> None:
        """Takes a message of the server, and stores the files of its jobs."""
        for path, content in files.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(content)
        self._worker.handle(message)

    def receive(self) -> list[tuple[Message, Files]]:
        """The next messages for the server."""
        return self._outbox.take()

    def _run(self) -> None:
        try:
            self._worker.run()
        finally:
            os._exit(1)  # a worker that computes no more; the server starts another one


def _read(*paths: Path) -> Files:
    return {str(path): path.read_bytes() for path in paths if path.is_file()}
