"""Whether jobs of one size are faster together: measured, not assumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAX_SIZES = 1_000  # kinds of jobs that are remembered
GAIN = 0.95  # a batch must take less than this part of the time of single jobs


class BatchSpeed:
    """The best seconds of a step by kind of job and batch size.

    The first jobs of a kind run one alone and then the rest together; from then on, whichever took less time per job.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, dict[int, float]] = {}  # kind -> number of jobs -> seconds of a step
        self._tried: set[str] = set()  # kinds that have run together

    def groups(self, tasks: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """The tasks of one kind in the groups to compute."""
        if len(tasks) < 2:
            return [list(tasks)]
        kind = tasks[0]["batch_key"]
        known = self._seconds.get(kind, {})
        if kind not in self._tried:
            self._tried.add(kind)
            return [list(tasks)] if 1 in known else [[tasks[0]], list(tasks[1:])]
        return [[task] for task in tasks] if self.is_slower(kind) else [list(tasks)]

    def is_slower(self, kind: str) -> bool:
        """Whether jobs of this kind were tried together and took as long as alone, or longer."""
        known = self._seconds.get(kind, {})
        together = [known[rows] / rows for rows in known if rows > 1]
        faster = together and min(together) < GAIN * known.get(1, float("inf"))
        return kind in self._tried and not faster

    def record(self, kind: str, rows: int, seconds: float) -> None:
        """Notes the seconds of a step of `rows` jobs."""
        if kind not in self._seconds and len(self._seconds) >= MAX_SIZES:
            del self._seconds[next(iter(self._seconds))]
        known = self._seconds.setdefault(kind, {})
        known[rows] = min(seconds, known.get(rows, seconds))
