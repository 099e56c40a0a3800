"""Kill -9 of workers and server: no job is lost, none runs twice, and the bytes are those of undisturbed runs."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.full import FULL, count
from tests.serving.programs import KEY, SEED, ServerProgram, wait_for_all

PROMPT = "a red circle moving right on a black background"
REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": PROMPT, "steps": 8},
    {"prompt": "a blue square growing", "steps": 12},
    {"prompt": "a green circle", "steps": 12, "num_frames": 1},
    {"prompt": PROMPT, "steps": 12, "steps_until": 8},
    {"prompt": "|0|a red circle|1|a blue circle", "steps": 6, "loop": 2, "num_frames": 34},
)
SMALL = {"width": 32, "height": 32}


@pytest.mark.timeout(3600)
def test_kills_lose_nothing(server: ServerProgram, tmp_path: Path) -> None:
    if FULL:
        server = ServerProgram(tmp_path / "data", "--devices", "cpu", "--api-key", KEY).start()

    def kill_workers() -> None:
        for pid in server.worker_pids():
            os.kill(pid, signal.SIGKILL)

    check_kills(server, kill_workers, random.Random(SEED), num_jobs=count(2, 60), kills=count(2, 20))
    if FULL:
        server.stop()


def check_kills(
    server: ServerProgram, kill_workers: Callable[[], None], rng: random.Random, *, num_jobs: int, kills: int
) -> None:
    """Kills workers and server in turn at random moments of some jobs, and compares these with undisturbed ones."""
    wanted = [{**SMALL, **REQUESTS[number % len(REQUESTS)], "seed": number} for number in range(num_jobs)]
    with server.client() as web:
        ids = [web.post("/v1/videos", json=one).raise_for_status().json()["id"] for one in wanted]
    for number in range(kills):
        wait_for_step(server, ids, rng)
        if number % 2:
            server.kill()
            server.start()
        else:
            kill_workers()
    with server.client() as web:
        jobs = wait_for_all(web, ids, 1500)
        assert {job["status"] for job in jobs.values()} == {"completed"}, jobs
        assert {job["id"] for job in web.get("/v1/videos?limit=100").json()["data"]} >= set(ids)
        again = {id: web.post(f"/v1/videos/{id}/replay").raise_for_status().json()["id"] for id in ids}
        drafts = [id for id in ids if jobs[id]["draft"]]
        undisturbed = wait_for_all(web, list(again.values()), 1500)
        for id, other in again.items():
            assert undisturbed[other]["identical"], (jobs[id], undisturbed[other])
            assert web.get(f"/v1/videos/{id}/content").content == web.get(f"/v1/videos/{other}/content").content
        rest = [web.post(f"/v1/videos/{id}/continue").raise_for_status().json()["id"] for id in drafts]
        assert all(job["status"] == "completed" for job in wait_for_all(web, rest, 1500).values())


def wait_for_step(server: ServerProgram, ids: list[str], rng: random.Random) -> None:
    """Waits until a job has taken some steps, or all are finished, and a random moment more."""
    least, end = rng.randrange(1, 80), time.monotonic() + 120
    with server.client() as web:
        while time.monotonic() < end:
            jobs = [web.get(f"/v1/videos/{id}").json() for id in ids]
            if any(job["progress"] >= least and job["status"] == "in_progress" for job in jobs):
                break
            if all(job["status"] in ("completed", "failed") for job in jobs):
                break
            time.sleep(0.05)
    time.sleep(rng.uniform(0, 0.3))


def test_state_of_a_stopped_server_is_refused_to_a_second_one(server: ServerProgram) -> None:
    with pytest.raises(AssertionError, match="another server uses it"):
        ServerProgram(server.folder, "--devices", "cpu", log="second.log").start()
