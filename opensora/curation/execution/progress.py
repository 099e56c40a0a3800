"""Progress on a terminal: clips done, kept and quarantined, and the time left."""

from __future__ import annotations

import logging
from typing import Any

from tqdm import tqdm

from opensora.curation.execution.task import StageResult, Task

log = logging.getLogger("opensora")


class Progress:
    """The bar of a group of stages; nothing where standard error is no terminal."""

    def __init__(self, names: str, total: int, done: int) -> None:
        self._bar: Any = tqdm(desc=names, total=total, initial=done, unit="clip", disable=None, smoothing=0.05)
        self._kept = self._quarantined = 0

    def add(self, task: Task, found: StageResult) -> None:
        """Counts the clip of a task at its last result: an error, or that of the last stage."""
        failed = found.result.rows is None
        if failed or found.stage == task.stages[-1]:
            self._kept += not failed
            self._quarantined += failed
            self._bar.set_postfix(kept=self._kept, quarantined=self._quarantined, refresh=False)
            self._bar.update()

    def warn(self, text: str) -> None:
        """Logs a warning above the bar."""
        self._bar.clear()
        log.warning("%s", text)

    def close(self) -> None:
        self._bar.close()
