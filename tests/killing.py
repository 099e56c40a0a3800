"""Runs a training program and kills it (SIGKILL) again and again before letting it finish, resuming each time.

Every rank of every run is a process of its own, forked so that the imports are paid once. Saves of runs that are killed
are slowed down, so that kills fall into them too. `seen.RANK.jsonl` in the outputs has a line for each batch: its step,
its number in the step, the names of its samples and its loss, those of steps that were taken twice included.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opensora.models.text_encoder.cleaning import preprocess
from opensora.training.checkpoint import folders, write
from opensora.training.step import TrainStep
from opensora.training.throughput import StepCost
from tests.ranks import fork_server

ROOT = Path(__file__).parents[1]
MOMENTS = ("start", "step", "save", "save", "step")


def run(script: str, config: Path, outputs: Path, seed: int = 0, kills: int = 0, ranks: int = 1) -> list[str]:
    """Runs a program to its end, killed `kills` times; the moments of the kills that came before the end."""
    outputs.mkdir(exist_ok=True)
    process = fork_server().Process(target=_killed, args=(script, config, outputs, seed, kills, ranks))
    process.start()
    try:
        process.join()
    finally:
        process.kill()
    assert process.exitcode == 0, (outputs / "printed.txt").read_text()[-2000:]
    return json.loads((outputs / "kills.json").read_text())


def _killed(script: str, config: Path, outputs: Path, seed: int, kills: int, ranks: int) -> None:
    os.chdir(ROOT)
    if kills:
        slow_down_saves()
    record(outputs)
    preprocess("imports what it needs")
    StepCost.__call__ = lambda *_: (1, 0.0)  # a second for each new size
    rng, moments = random.Random(seed), []
    for moment in rng.sample(MOMENTS * kills, kills):
        children = start(script, config, outputs, ranks)
        if wait_until(children, reached(moment, outputs, rng)) and kill(children, rng):
            moments.append(moment)
    wait_until(start(script, config, outputs, ranks), lambda: False)
    (outputs / "kills.json").write_text(json.dumps(moments))


def slow_down_saves() -> None:
    sync = write._sync

    def slow_sync(folder: Path) -> None:
        time.sleep(0.05)
        sync(folder)
        time.sleep(0.05)

    write._sync = slow_sync


def record(outputs: Path) -> None:
    accumulate = TrainStep._accumulate

    def recorded(self: TrainStep, step: int, part: int, batch: Any) -> Any:
        loss = accumulate(self, step, part, batch)
        names = batch["names"] if isinstance(batch, dict) else []
        number = part * self.layout.data_size + self.layout.data_rank
        line = {"step": step, "batch": number, "names": names, "loss": loss.item()}
        with (outputs / f"seen.{self.layout.rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return loss

    TrainStep._accumulate = recorded


def newest_experiment(outputs: Path) -> Path | None:
    """The last experiment folder with a finished checkpoint."""
    found = [folder for folder in sorted(outputs.glob("*-*")) if folders.checkpoints(folder)]
    return found[-1] if found else None


def start(script: str, config: Path, outputs: Path, ranks: int = 1) -> list[int]:
    """Starts the program in new processes, resuming where there is something to resume; returns their ids."""
    experiment = newest_experiment(outputs)
    load = ("--load", str(experiment)) if experiment else ()
    sys.argv = [script, str(config), "--outputs", str(outputs), *load]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [fork(script, outputs, {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]


def fork(script: str, outputs: Path, environment: dict[str, str]) -> int:
    if child := os.fork():
        return child
    status = 1
    try:
        os.environ.update(environment)
        printed = os.open(outputs / "printed.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def reached(moment: str, outputs: Path, rng: random.Random) -> Callable[[], bool]:
    """Whether a run that starts now has come to `moment`."""
    if moment == "save":
        leftovers = unfinished(outputs)  # of earlier kills
        return lambda: bool(unfinished(outputs) - leftovers)
    if moment == "step":
        begun, steps = logged(outputs), rng.randint(1, 3)
        return lambda: logged(outputs) >= begun + steps
    deadline = time.monotonic() + rng.uniform(0, 0.5)
    return lambda: time.monotonic() > deadline


def unfinished(outputs: Path) -> set[tuple[str, int]]:
    """The hidden folders of saves, each with the time of its last change."""
    found = set()
    for path in outputs.glob("*-*/.epoch*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((str(path), path.stat().st_mtime_ns))
    return found


def logged(outputs: Path) -> int:
    return sum(path.read_text().count("\n") for path in outputs.glob("*-*/log.jsonl"))


def wait_until(children: list[int], condition: Callable[[], bool]) -> bool:
    """True once the condition holds, False when all children have ended before; a failure of one is one here."""
    running = set(children)
    while not condition():
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if status:
                raise RuntimeError(f"the program failed with status {os.waitstatus_to_exitcode(status)}")
            running.discard(ended)
        if not running:
            return False
        time.sleep(0.002)
    return True


def kill(children: list[int], rng: random.Random) -> bool:
    """Kills all ranks, in any order; whether one of them was still at work."""
    time.sleep(rng.uniform(0, 0.1))
    statuses = []
    for child in rng.sample(children, len(children)):
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            statuses.append(os.waitpid(child, 0)[1])
    return any(os.WIFSIGNALED(status) for status in statuses)
