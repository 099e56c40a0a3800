"""The embedded executor: spawned worker processes with one task in flight each.

A worker that dies, hangs or takes too much memory is replaced; its task is retried, then reported with the reason.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from opensora.curation.execution.ledger import Result
from opensora.curation.execution.settings import Limits
from opensora.curation.execution.task import StageResult, Task, run_task
from opensora.curation.stages.stage import Stage
from opensora.errors import OpenSoraError

POLL_SECONDS = 0.2  # between checks of time and memory
MIB = 2**20


def run_serial(tasks: Iterable[Task], stages: Sequence[Stage]) -> Iterator[tuple[Task, StageResult]]:
    """Runs all tasks in this process, without limits."""
    for stage in stages:
        stage.setup()
    for task in tasks:
        for result in run_task(task, stages):
            yield task, result


def run_pool(
    tasks: Iterable[Task], stages: Sequence[Stage], num_workers: int, limits: Limits
) -> Iterator[tuple[Task, StageResult]]:
    """Runs tasks on worker processes; yields results as they come, those of one task in the order of its stages."""
    pool = Pool(stages, num_workers, limits)
    try:
        yield from pool.run(iter(tasks))
    finally:
        pool.close()


class _Worker:
    """A process, and the task that it runs."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, child = context.Pipe()
        self.process: Any = context.Process(target=_work, args=(child, list(stages)), daemon=True)
        self.process.start()
        child.close()
        self.task: Task | None = None
        self.done: list[int] = []  # stages of the task that have results
        self.since = time.monotonic()
        self.ready = False  # models are loaded

    def begin(self, task: Task) -> None:
        self.task, self.done, self.since = task, [], time.monotonic()
        self.connection.send(task)

    def problem(self, limits: Limits) -> str | None:
        """Why the worker must be replaced."""
        if not self.process.is_alive():
            return f"its process ended ({_exit_reason(self.process.exitcode)})"
        if self.task is None or not self.ready:
            return None
        if time.monotonic() - self.since > limits.seconds:
            return f"it took more than {limits.seconds:g} s"
        memory = _resident_bytes(self.process.pid)
        if memory > limits.memory_mib * MIB:
            return f"it took more than {limits.memory_mib} MiB of memory"
        return None

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Pool:
    """Worker processes that run tasks; `run` may be called again and again until `close`."""

    def __init__(self, stages: Sequence[Stage], num_workers: int, limits: Limits) -> None:
        self.stages, self.limits = stages, limits
        self.retries: deque[Task] = deque()
        self.attempts: dict[int, int] = {}  # task number -> workers that died of it
        self.num_workers = num_workers
        self.workers: list[_Worker] = []  # started when there is work for them

    def run(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, StageResult]]:
        """The results of tasks as they come. A task is taken when a worker is free. Raises errors of `Stage.setup`."""
        while True:
            while self._has_room() and (task := self._next(tasks)) is not None:
                self._idle_worker().begin(task)
            busy = [worker for worker in self.workers if worker.task is not None]
            if not busy:
                return
            ready = wait([worker.connection for worker in busy], timeout=POLL_SECONDS)
            for worker in busy:
                if worker.connection in ready:
                    yield from self._receive(worker)
                if worker.task is not None and (reason := worker.problem(self.limits)):
                    yield from self._receive(worker)  # results sent before the end
                    yield from self._replace(worker, reason)

    def _has_room(self) -> bool:
        return len(self.workers) < self.num_workers or any(worker.task is None for worker in self.workers)

    def _idle_worker(self) -> _Worker:
        idle = next((worker for worker in self.workers if worker.task is None), None)
        if idle is None:
            idle = _Worker(self.stages)
            self.workers.append(idle)
        return idle

    def _next(self, tasks: Iterator[Task]) -> Task | None:
        return self.retries.popleft() if self.retries else next(tasks, None)

    def _receive(self, worker: _Worker) -> Iterator[tuple[Task, StageResult]]:
        """All messages that a worker has sent: StageResult, None at the end of a task, or an error of its setup."""
        try:
            while worker.task is not None and worker.connection.poll():
                message = worker.connection.recv()
                worker.since = time.monotonic()
                if isinstance(message, OpenSoraError):
                    raise message
                if message is None:
                    worker.task = None
                elif message is True:
                    worker.ready = True
                else:
                    worker.done.append(message.stage)
                    attempts = 1 + self.attempts.get(worker.task.number, 0)
                    yield worker.task, StageResult(message.stage, message.result._replace(attempts=attempts))
        except (EOFError, ConnectionError):
            return

    def _replace(self, worker: _Worker, reason: str) -> Iterator[tuple[Task, StageResult]]:
        """Ends a worker; its task is retried from the stage that ended it, or reported."""
        task = worker.task
        worker.kill()
        self.workers.remove(worker)
        if task is None:
            return
        left = tuple(stage for stage in task.stages if stage not in worker.done)
        if not left:
            return
        self.attempts[task.number] = attempts = self.attempts.get(task.number, 0) + 1
        if attempts < self.limits.attempts:
            self.retries.append(task._replace(stages=left))
            return
        where = f"{task.clip.path}: stage {self.stages[left[0]].name} was given up after {attempts} attempts"
        yield task, StageResult(left[0], Result(None, f"{where}; {reason}", attempts))

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()


def _work(connection: Connection, stages: list[Stage]) -> None:
    """The loop of a worker process. It ends with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        try:
            for stage in stages:
                stage.setup()
        except OpenSoraError as error:
            connection.send(error)
            return
        connection.send(True)
        while True:
            task: Task = connection.recv()
            for result in run_task(task, stages):
                connection.send(result)
            connection.send(None)
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _exit_reason(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"status {code}"


def _resident_bytes(pid: int) -> int:
    """The resident memory of a process; 0 where the system does not say."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
