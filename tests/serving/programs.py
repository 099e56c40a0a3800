"""`opensora serve` as a process of its own, in a process group that can be killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
START_SECONDS = 250.0
SEED = int(os.environ.get("OPENSORA_TEST_SEED", "0"))
KEY, OTHER = "key-of-one-client", "key-of-another"
HEADERS = {"Authorization": f"Bearer {KEY}"}


class ServerProgram:
    """A server on a free port, with its data in `folder`."""

    def __init__(self, folder: Path, *flags: str, log: str = "serve.log") -> None:
        self.folder, self.flags, self.log = folder, flags, folder.with_name(log)
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> ServerProgram:
        log = self.log
        before = log.stat().st_size if log.exists() else 0
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "opensora", "serve", "--port", "0", "--data", str(self.folder), *self.flags]
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stderr=file, env=environment, start_new_session=True)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            if found := re.search(rb"^(http://\S+)", log.read_bytes()[before:], re.MULTILINE):
                self.url = found[1].decode()
                return self
            time.sleep(0.1)
        raise AssertionError(log.read_text()[-2000:])

    def client(self, **options: Any) -> httpx.Client:
        """A client with the first key."""
        return httpx.Client(**{"base_url": self.url, "timeout": 120, "headers": HEADERS, **options})

    def worker_pids(self) -> list[int]:
        """The processes of `opensora.serving.worker` that this server has started."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"opensora.serving.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def kill(self) -> None:
        """SIGKILL for the HTTP process; its workers end when they see that it is gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Asks the server to end; its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(120)
        finally:
            self.process.kill()


def wait_for_all(client: httpx.Client, ids: list[str], seconds: float = 240) -> dict[str, dict[str, Any]]:
    """The jobs, once all are finished."""
    jobs: dict[str, dict[str, Any]] = {}
    end = time.monotonic() + seconds
    while len(jobs) < len(ids):
        assert time.monotonic() < end, f"{len(ids) - len(jobs)} of {len(ids)} jobs are not finished"
        for id in [one for one in ids if one not in jobs]:
            job = client.get(f"/v1/videos/{id}").raise_for_status().json()
            if job["status"] in ("completed", "failed"):
                jobs[id] = job
        time.sleep(0.1)
    return jobs
