"""When a group of stages stops to take clips: its budget is spent, or what it depends on does not answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from opensora.curation.execution.task import StageResult, Task
from opensora.curation.stages.stage import Stage

MAX_FAILURES = 10  # in a row that lie outside of the clips


class Gate:
    """Lets tasks of a group through until it is `closed`, which says why; empty while it is open."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages, self.closed = stages, ""
        self._failures = 0

    def admitted(self, tasks: Iterable[Task]) -> Iterator[Task]:
        limits = {stage.max_items: stage for stage in self.stages if stage.max_items is not None}
        most = min(limits, default=None)
        for count, task in enumerate(tasks):
            if most is not None and count >= most:
                self.closed = f"{limits[most].name} takes {most:,} clips in a run; run again for the others"
            if self.closed:
                return
            yield task

    def add(self, found: StageResult) -> None:
        """Counts a result."""
        self._failures = 0 if found.result.lasting else self._failures + 1
        if self._failures >= MAX_FAILURES and not self.closed:
            self.closed = f"it was stopped after {self._failures} failures in a row, the last: {found.result.error}"
