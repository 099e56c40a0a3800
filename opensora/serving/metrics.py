"""Figures for Prometheus, in its text format."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from opensora.serving.job import COMPLETED, FAILED, QUEUED, RUNNING
from opensora.serving.state import ServerState

STATUSES = (QUEUED, RUNNING, COMPLETED, FAILED)


def metrics_text(state: ServerState) -> str:
    """The figures of a server, one a line."""
    dispatcher, counts = state.dispatcher, state.store.counts()
    figures: list[tuple[str, str, str, Mapping[str, float]]] = [
        ("opensora_workers_ready", "gauge", "workers that can compute", {"": dispatcher.ready}),
        ("opensora_worker_deaths_total", "counter", "workers that have ended", {"": dispatcher.deaths}),
        ("opensora_jobs", "gauge", "kept jobs", {f'{{status="{one}"}}': counts.get(one, 0) for one in STATUSES}),
        ("opensora_jobs_finished_total", "counter", "jobs finished since the start", {"": dispatcher.finished}),
        ("opensora_seconds_per_job", "gauge", "average time of a job", {"": dispatcher.seconds_per_job}),
        ("opensora_event_streams", "gauge", "open event streams", {"": len(state.events)}),
        ("opensora_disk_bytes", "gauge", "bytes of results and uploads", {"": state.store.disk_use()}),
        ("opensora_uptime_seconds", "gauge", "seconds since the start", {"": time.time() - state.started_at}),
        ("opensora_memory_bytes", "gauge", "resident memory", _memory(state)),
    ]
    lines = []
    for name, kind, text, values in figures:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{labels} {value:.10g}" for labels, value in values.items()]
    return "\n".join(lines) + "\n"


def _memory(state: ServerState) -> dict[str, float]:
    """Resident bytes of each process, by its role."""
    pids = {"server": os.getpid(), "planner": state.planner.pid}
    pids |= {f"worker{number}": pid for number, pid in enumerate(state.dispatcher.worker_pids)}
    found = {f'{{process="{role}"}}': _resident(pid) for role, pid in pids.items() if pid is not None}
    return {labels: size for labels, size in found.items() if size}


def _resident(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))
