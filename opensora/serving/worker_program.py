"""The program of the workers: it computes on this machine, or has an actor on a Ray cluster compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

NICE = 5  # of a worker on this machine, so that the HTTP process answers while it computes


class WorkerProgram(NamedTuple):
    """A module that is run as a worker, and the options that it is given first."""

    module: str
    options: dict[str, Any]


class RayCluster(NamedTuple):
    """A Ray cluster: its address (`auto`: that of this machine), and how many actors compute; None: one a GPU."""

    address: str = "auto"
    workers: int | None = None


def worker_program(models: list[str], folder: Path, cluster: RayCluster | None) -> WorkerProgram:
    """The program of the workers of a server with this data folder."""
    options: dict[str, Any] = {"models": models, "data": str(folder)}
    if cluster is None:
        return WorkerProgram("opensora.serving.worker", {**options, "nice": NICE})
    return WorkerProgram("opensora.serving.ray_worker", {**options, **cluster._asdict()})
