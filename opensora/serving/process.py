"""A worker process as the HTTP process sees it: started, written to, read from, killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from opensora.serving.channel import MAX_BYTES, Message

SECRETS = ("OPENSORA_API_KEY", "OPENAI_API_KEY")  # that the HTTP process alone needs


class WorkerProcess:
    """`python -m MODULE` in a process group of its own, with a first message of `options`."""

    def __init__(self, module: str, **options: Any) -> None:
        self.module, self.options = module, options
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """The id of the process, None while there is none."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self) -> None:
        """Starts the process."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", self.module, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            start_new_session=True, limit=MAX_BYTES, env=_without_secrets(os.environ),
        )  # fmt: skip
        self.send(**self.options)

    def send(self, **message: Any) -> None:
        """Sends a message. A process that has died does not read it; `receive` tells."""
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(ConnectionError, RuntimeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def receive(self, timeout: float) -> Message | None:
        """The next message; None when the process has ended, or says nothing for `timeout` seconds."""
        assert self._process is not None and self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), timeout)
            return json.loads(line) if line.endswith(b"\n") else None
        except (asyncio.TimeoutError, ValueError):
            return None

    async def kill(self) -> None:
        """Kills the process group and waits for its end."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in SECRETS}
