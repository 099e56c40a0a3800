"""The executors: in this process, on worker processes, or on a Ray cluster. All of them give the same results."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opensora.curation.execution.local import run_pool, run_serial
from opensora.curation.execution.settings import ExecutorSettings
from opensora.curation.execution.task import Executor
from opensora.curation.stages.stage import Stage
from opensora.errors import ConfigError

NAMES = ("local", "ray")


@contextmanager
def open_executor(settings: ExecutorSettings) -> Iterator[Executor]:
    """The executor of these settings. Raises ConfigError for wrong settings, without Ray and without its cluster."""
    if settings.kind not in NAMES:
        raise ConfigError(f"executor '{settings.kind}' is not known; choose {' or '.join(NAMES)}")
    if settings.address is not None and settings.kind != "ray":
        raise ConfigError("--address names a Ray cluster; give --executor ray with it")
    if settings.kind == "ray":
        from opensora.curation.execution.ray import open_cluster

        with open_cluster(settings) as run:
            yield run
    elif settings.workers == 0:
        yield run_serial
    else:
        workers = settings.workers or os.cpu_count() or 1
        yield lambda tasks, stages: run_pool(tasks, stages, _processes(workers, stages), settings.limits)


def _processes(workers: int, stages: Sequence[Stage]) -> int:
    """The number of processes of a group: what its stage states, else one for a model on an accelerator."""
    for stage in stages:
        if stage.num_workers is not None:
            return stage.num_workers
        if stage.place == "accelerator":
            from opensora.acceleration.device import is_cpu, pick_device

            return workers if is_cpu(pick_device()) else 1
    return workers
