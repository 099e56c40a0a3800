"""Stages on a Ray cluster: Ray Core tasks, and actors with a GPU each for stages with models.

A Ray worker runs its tasks in a process of its own, by `local.Pool`: limits, retries and reasons are the same as
without Ray, which itself retries what was lost with a node. Paths and spans travel, frames never do; the driver alone
writes the ledger.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from opensora.curation.execution.ledger import Result
from opensora.curation.execution.local import Pool
from opensora.curation.execution.settings import ExecutorSettings, Limits
from opensora.curation.execution.task import Executor, StageResult, Task
from opensora.curation.stages.stage import Stage
from opensora.distributed.ray_cluster import connected
from opensora.errors import OpenSoraError

TASKS_PER_CORE = 2  # in flight
RETRIES = 1  # of a task whose Ray worker was lost


@contextmanager
def open_cluster(settings: ExecutorSettings) -> Iterator[Executor]:
    """Connects to a cluster, or starts one on this machine. Raises ConfigError without Ray or without the cluster."""
    with connected(settings.address or "local") as ray:
        yield lambda tasks, stages: _run(ray, tasks, stages, settings)


class _Backend(Protocol):
    """Where tasks go: at most `capacity` at once."""

    capacity: int

    def submit(self, task: Task) -> Any:
        """The reference of a task's results."""

    def done(self, reference: Any) -> None:
        """Called once the task of a reference has ended."""

    def close(self, references: Sequence[Any]) -> None:
        """Ends the tasks of these references."""


def _run(
    ray: Any, tasks: Iterator[Task], stages: Sequence[Stage], settings: ExecutorSettings
) -> Iterator[tuple[Task, StageResult]]:
    backend = _backend(ray, stages, settings)
    running: dict[Any, Task] = {}
    try:
        while True:
            while len(running) < backend.capacity and (task := next(tasks, None)) is not None:
                running[backend.submit(task)] = task
            if not running:
                return
            [reference], _ = ray.wait(list(running), num_returns=1)
            task = running.pop(reference)
            for result in _results(ray, reference, task, stages):
                yield task, result
            backend.done(reference)
    finally:
        backend.close(list(running))


def _results(ray: Any, reference: Any, task: Task, stages: Sequence[Stage]) -> list[StageResult]:
    """The results of a task, or that it was given up. Raises errors of `Stage.setup`."""
    try:
        found: list[StageResult] = ray.get(reference)
        return found
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OpenSoraError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        attempts, stage = RETRIES + 1, task.stages[0]
        where = f"{task.clip.path}: stage {stages[stage].name} was given up after {attempts} attempts"
        return [StageResult(stage, Result(None, f"{where}; its Ray worker ended ({type(error).__name__})", attempts))]


def _backend(ray: Any, stages: Sequence[Stage], settings: ExecutorSettings) -> _Backend:
    resources = ray.cluster_resources()
    cores, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    limit = min([stage.num_workers for stage in stages if stage.num_workers is not None], default=None)
    work = _Work(list(stages), settings.limits, os.getcwd())
    if any(stage.place == "accelerator" for stage in stages):
        return _Actors(ray, work, gpus or min(limit or cores, settings.workers or cores), 1 if gpus else 0)
    return _Tasks(ray, work, limit or settings.workers or TASKS_PER_CORE * cores)


@dataclass(frozen=True)
class _Work:
    """What a Ray worker needs for any task of a group. `folder` is what relative paths begin at."""

    stages: list[Stage]
    limits: Limits
    folder: str

    def pool(self) -> Pool:
        if Path(self.folder).is_dir():
            os.chdir(self.folder)
        return Pool(self.stages, 1, self.limits)


class _Tasks:
    """Ray Core tasks. A Ray worker keeps the process of its last group."""

    def __init__(self, ray: Any, work: _Work, capacity: int) -> None:
        self.ray, self.capacity = ray, capacity
        self.work = ray.put(work)
        self.group = self.work.hex()
        self.function = ray.remote(num_cpus=1, max_retries=RETRIES)(_run_task)

    def submit(self, task: Task) -> Any:
        return self.function.remote(self.group, self.work, task)

    def done(self, reference: Any) -> None:
        pass

    def close(self, references: Sequence[Any]) -> None:
        for reference in references:
            self.ray.cancel(reference, force=True)


_POOLS: dict[str, Pool] = {}  # of this Ray worker: at most one, by group


def _run_task(group: str, work: _Work, task: Task) -> list[StageResult]:
    if group not in _POOLS:
        while _POOLS:
            _POOLS.popitem()[1].close()
        _POOLS[group] = work.pool()
    return [result for _, result in _POOLS[group].run(iter([task]))]


class _Actors:
    """Actors that keep the models of a group, one task each at once."""

    def __init__(self, ray: Any, work: _Work, count: int, gpus: int) -> None:
        self.ray, self.capacity = ray, count
        make = ray.remote(num_gpus=gpus, num_cpus=1, max_restarts=-1, max_task_retries=RETRIES)(_Actor)
        self.idle = [make.remote(work) for _ in range(count)]
        self.all = list(self.idle)
        self.busy: dict[Any, Any] = {}

    def submit(self, task: Task) -> Any:
        actor = self.idle.pop()
        reference = actor.run.remote(task)
        self.busy[reference] = actor
        return reference

    def done(self, reference: Any) -> None:
        self.idle.append(self.busy.pop(reference))

    def close(self, references: Sequence[Any]) -> None:
        for actor in self.all:
            self.ray.kill(actor)


class _Actor:
    def __init__(self, work: _Work) -> None:
        self.pool = work.pool()

    def run(self, task: Task) -> list[StageResult]:
        return [result for _, result in self.pool.run(iter([task]))]
