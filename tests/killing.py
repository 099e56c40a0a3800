"""Runs a training program and kills it (SIGKILL) again and again before letting it finish, resuming each time.

python -m tests.killing SCRIPT CONFIG OUTPUTS SEED. Every run is a process of its own, forked so that the imports are
paid once. Saves are slowed down so that kills fall into them too. Prints the moments of the kills, one a line.
"""

from __future__ import annotations

import contextlib
import os
import random
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from diffusers import AutoencoderKL  # noqa: F401 (imported before the first fork)
from transformers import T5EncoderModel  # noqa: F401

from opensora.training import diffusion, state, vae  # noqa: F401

MOMENTS = ("start", "step", "save", "save", "step")


def main(script: str, config: str, outputs: Path, seed: int) -> None:
    slow_down_saves()
    rng = random.Random(seed)
    outputs.mkdir()
    moments = rng.sample(MOMENTS, len(MOMENTS))
    for moment in moments:
        child = start(script, config, outputs)
        killed = wait_until(child, reached(moment, outputs, rng)) and kill(child, rng.uniform(0, 0.1))
        print(f"killed: {moment}" if killed else "finished before the kill", flush=True)
    child = start(script, config, outputs)
    wait_until(child, lambda: False)


def slow_down_saves() -> None:
    sync = state._sync

    def slow_sync(folder: Path) -> None:
        time.sleep(0.05)
        sync(folder)
        time.sleep(0.05)

    state._sync = slow_sync


def newest_experiment(outputs: Path) -> Path | None:
    """The last experiment folder with a finished checkpoint."""
    folders = [folder for folder in sorted(outputs.glob("*-*")) if state.checkpoints(folder)]
    return folders[-1] if folders else None


def start(script: str, config: str, outputs: Path) -> int:
    """Starts the program in a new process, resuming where there is something to resume; returns its id."""
    experiment = newest_experiment(outputs)
    sys.argv = [script, config, "--outputs", str(outputs), *(("--load", str(experiment)) if experiment else ())]
    if child := os.fork():
        return child
    status = 1
    try:
        printed = os.open(outputs / "printed.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def reached(moment: str, outputs: Path, rng: random.Random) -> Callable[[], bool]:
    """Whether a run that starts now has come to `moment`."""
    if moment == "save":
        leftovers = unfinished(outputs)  # of earlier kills
        return lambda: bool(unfinished(outputs) - leftovers)
    if moment == "step":
        begun, steps = logged(outputs), rng.randint(1, 2)
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


def wait_until(child: int, condition: Callable[[], bool]) -> bool:
    """True once the condition holds, False when the child ends before; its failure is a failure here."""
    while not condition():
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError(f"the program failed with status {os.waitstatus_to_exitcode(status)}")
            return False
        time.sleep(0.002)
    return True


def kill(child: int, delay: float) -> bool:
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
