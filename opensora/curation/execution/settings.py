"""Settings of the executors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Limits:
    """Limits per task: seconds of one stage, MiB of a worker, and attempts of a task whose worker died."""

    seconds: float = 600.0
    memory_mib: int = 4096
    attempts: int = 2


@dataclass(frozen=True)
class ExecutorSettings:
    """Which executor runs the tasks.

    workers: processes of `local` (0: this one, without limits; None: one per core), tasks in flight of `ray` (None: two
    per core of the cluster); address: of a Ray cluster, by default one of this machine for the time of the run.
    """

    kind: Literal["local", "ray"] = "local"
    workers: int | None = None
    limits: Limits = field(default_factory=Limits)
    address: str | None = None
