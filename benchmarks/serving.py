"""`opensora serve` under load, on a CPU: answers, fairness, memory, and what computing jobs together saves.

python benchmarks/serving.py [--jobs 300] [--clients 20] [--steps 4] [--side 32] [--output FILE]

One server, two keys: three quarters of the clients use the first, the others the second; each client sends a job, waits
for it, and sends the next. Meanwhile another connection asks for the state of random jobs. Printed are: jobs lost,
percentiles of the time that a state takes, the second key's share of the jobs (a half, where keys take turns), and the
resident memory of each process over time. Then `--gain-jobs` jobs of one size run on a server that computes them
together and on one that does not, in turn. Exits with 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from opensora.cli.program import run_program
from opensora.errors import OpenSoraError
from opensora.files import atomic_write

KEYS = ("first-key-of-two", "second-key-of-two")
PROMPTS = ("a red circle moving right", "a blue square growing", "a green triangle", "a yellow circle moving left")
POLL_SECONDS, ASK_SECONDS, MEMORY_SECONDS = 0.5, 0.05, 2.0
MOST_P99, MOST_GROWTH = 0.1, 0.1  # bars: seconds; share of the memory at a quarter of the run


class Server:
    """`opensora serve` on a free port, with an empty folder."""

    def __init__(self, folder: Path, *flags: str) -> None:
        words = ["serve", "--port", "0", "--data", str(folder), "--devices", "cpu", "--max-queued", "1000", *flags]
        keys = [word for key in KEYS for word in ("--api-key", key)]
        command, log = [sys.executable, "-m", "opensora", *words, *keys], folder.with_suffix(".log")
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(command, stderr=file, start_new_session=True)
        while not (found := re.search(r"http://\S+(?=\n)", log.read_text(encoding="utf-8"))):
            if self.process.poll() is not None:
                raise OpenSoraError(f"the server did not start: {log.read_text(encoding='utf-8')}")
            time.sleep(0.1)
        self.url = found[0]

    def client(self, key: str) -> httpx.AsyncClient:
        """A client with this key."""
        return httpx.AsyncClient(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=600)

    def stop(self) -> None:
        """Ends the server and its workers."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


class Load:
    """Clients, and what they see."""

    def __init__(self, server: Server, fields: dict[str, Any], num_jobs: int) -> None:
        self.server, self.fields, self.num_jobs = server, fields, num_jobs
        self.jobs: list[dict[str, Any]] = []  # finished
        self.sent: list[tuple[str, str]] = []  # id and key
        self.answers: list[float] = []  # seconds
        self.memory: list[dict[str, float]] = []  # process -> MiB

    async def run(self, num_clients: int) -> None:
        """Sends all jobs and waits for them."""
        first = num_clients * 3 // 4
        keys = [KEYS[number >= first] for number in range(num_clients)]
        watchers = [asyncio.create_task(self._ask()), asyncio.create_task(self._weigh())]
        await asyncio.gather(*(self._client(key) for key in keys))
        for watcher in watchers:
            watcher.cancel()

    async def _client(self, key: str) -> None:
        async with self.server.client(key) as web:
            while len(self.sent) < self.num_jobs:
                number = len(self.sent)
                self.sent.append(("", key))
                body = {**self.fields, "prompt": PROMPTS[number % len(PROMPTS)], "seed": number}
                answer = await web.post("/v1/videos", json=body)
                job = answer.raise_for_status().json()
                self.sent[number] = (job["id"], key)
                while job["status"] in ("queued", "in_progress"):
                    await asyncio.sleep(POLL_SECONDS)
                    job = (await web.get(f"/v1/videos/{job['id']}")).raise_for_status().json()
                self.jobs.append({**job, "key": key})

    async def _ask(self) -> None:
        """Asks for the states of random jobs, and notes how long the answers take."""
        async with self.server.client(KEYS[0]) as web:
            while True:
                await asyncio.sleep(ASK_SECONDS)
                ids = [id for id, key in self.sent if id and key == KEYS[0]]
                if ids:
                    begin = time.perf_counter()
                    (await web.get(f"/v1/videos/{random.choice(ids)}")).raise_for_status()
                    self.answers.append(time.perf_counter() - begin)

    async def _weigh(self) -> None:
        async with self.server.client(KEYS[0]) as web:
            while True:
                text = (await web.get("/metrics")).text
                found = re.findall(r'opensora_memory_bytes\{process="(\w+)"\} (\S+)', text)
                self.memory.append({name: float(size) / 2**20 for name, size in found})
                await asyncio.sleep(MEMORY_SECONDS)

    def report(self) -> dict[str, Any]:
        """The figures."""
        answers = sorted(self.answers)
        percentiles = {f"p{p}": answers[min(len(answers) * p // 100, len(answers) - 1)] for p in (50, 90, 99)}
        quarter = self.memory[len(self.memory) // 4]
        growth = {name: self.memory[-1].get(name, 0) / size - 1 for name, size in quarter.items()}
        return {
            "jobs": len(self.jobs), "lost": self.num_jobs - sum(job["status"] == "completed" for job in self.jobs),
            "twice": len(self.jobs) - len({job["id"] for job in self.jobs}), "answers": len(answers), **percentiles,
            "share_of_second_key": sum(job["key"] == KEYS[1] for job in self.jobs) / len(self.jobs),
            "waits": {key: self._wait(key) for key in KEYS}, "memory_at_a_quarter": quarter,
            "memory_end": self.memory[-1],
            "memory_growth": growth,
        }  # fmt: skip

    def _wait(self, key: str) -> float:
        """The average seconds from a job's creation to its start."""
        own = [job["started_at"] - job["created_at"] for job in self.jobs if job["key"] == key]
        return sum(own) / len(own)


async def gain(fields: dict[str, Any], num_jobs: int, rounds: int) -> dict[str, float]:
    """Processor seconds of a worker for a job, computed alone and together, over alternating rounds."""
    with tempfile.TemporaryDirectory() as name:
        servers = {n: Server(Path(name, str(n)), "--max-batch", str(n)) for n in (1, 4)}
        seconds = dict.fromkeys(servers, 0.0)
        try:
            for round in range(rounds + 1):
                for number, server in servers.items():
                    before = _worker_seconds(server)
                    await _send_together(server, fields, num_jobs)
                    if round:  # the first loads the models
                        seconds[number] += _worker_seconds(server) - before
        finally:
            for server in servers.values():
                server.stop()
    each = {number: total / rounds / num_jobs for number, total in seconds.items()}
    return {"alone": each[1], "together": each[4], "gain": each[1] / each[4]}


async def _send_together(server: Server, fields: dict[str, Any], count: int) -> None:
    async with server.client(KEYS[0]) as web:
        ids = []
        for number in range(count):
            body = {**fields, "prompt": PROMPTS[0], "seed": number}
            ids.append((await web.post("/v1/videos", json=body)).raise_for_status().json()["id"])
        for id in ids:
            while (await web.get(f"/v1/videos/{id}")).json()["status"] in ("queued", "in_progress"):
                await asyncio.sleep(0.1)


def _worker_seconds(server: Server) -> float:
    """Processor seconds of the worker of a server."""
    pid = server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    for child in children:
        if b"opensora.serving.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
            fields = Path(f"/proc/{child}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--gain-jobs", type=int, default=8)
    parser.add_argument("--gain-rounds", type=int, default=3)
    parser.add_argument("--output", default="outputs/benchmarks/serving.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the load and prints the figures; 1 where a bar is missed."""
    args = _parse(argv)
    fields = {"num_frames": 17, "steps": args.steps, "width": args.side, "height": args.side}
    with tempfile.TemporaryDirectory() as name:
        server = Server(Path(name, "data"))
        load, begin = Load(server, fields, args.jobs), time.perf_counter()
        try:
            asyncio.run(load.run(args.clients))
        finally:
            server.stop()
    report = {**load.report(), "seconds": time.perf_counter() - begin}
    report["batching"] = asyncio.run(gain(fields, args.gain_jobs, args.gain_rounds))
    print(json.dumps(report, indent=2))
    with atomic_write(args.output, make_folders=True) as [file]:
        file.write_text(json.dumps({**report, "memory": load.memory}, indent=2) + "\n", encoding="utf-8")
    flat = all(growth <= MOST_GROWTH for growth in report["memory_growth"].values())
    return 0 if not report["lost"] and not report["twice"] and report["p99"] <= MOST_P99 and flat else 1


if __name__ == "__main__":
    sys.exit(run_program(main))
