"""The number of steps of a run, and the learning rate of each."""

from __future__ import annotations

import math
from functools import cached_property

from opensora.config.settings import TrainSettings
from opensora.training.data.loader import BatchSource, DataPosition

LENGTH = "the length of the schedule"


class Schedule:
    """Counts steps of `batches_per_step` batches of all ranks, from `position` on, where `step` steps are done.

    Without max_steps a run ends with its epochs; their batches are counted without reading them. `skipped_batches` of
    them made no step because none of their samples could be read.
    """

    def __init__(
        self, settings: TrainSettings, source: BatchSource, batches_per_step: int, step: int = 0,
        position: DataPosition | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.source, self.batches_per_step = settings, source, batches_per_step
        self.step, self.position, self.skipped_batches = step, position or DataPosition(), 0

    @property
    def total_steps(self) -> int:
        """The number of steps of the whole run; a step may take batches of two epochs."""
        steps = -(-(self._batches_left - self.skipped_batches) // self.batches_per_step)
        return self.settings.max_steps or self.step + max(steps, 0)

    @cached_property
    def _batches_left(self) -> int:
        epochs = range(self.position.epoch, self.settings.epochs)
        return sum(self.source.count(epoch) for epoch in epochs) - self.position.batch

    @property
    def needs_length(self) -> bool:
        """Whether the learning rate depends on the number of steps, which takes long to count for a large table."""
        return self.settings.lr_schedule != "constant"

    @property
    def expected_steps(self) -> int:
        """`total_steps`, estimated where it is not needed exactly."""
        epochs = self.settings.epochs * self.source.count(0)
        exact = self.needs_length or self.settings.max_steps
        return self.total_steps if exact else -(-epochs // self.batches_per_step)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant or half a cosine down to zero after the last step."""
        warmup = self.settings.warmup_steps or 0
        if step < warmup:
            return self.settings.lr * (step + 1) / (warmup + 1)
        if not self.needs_length:
            return self.settings.lr
        progress = min((step - warmup) / max(self.total_steps - warmup, 1), 1.0)
        return self.settings.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def fingerprint(self) -> dict[str, str]:
        """The number of steps as an entry of the run's fingerprint, unless max_steps, an entry already, gives it."""
        return {LENGTH: str(self.total_steps)} if self.needs_length and not self.settings.max_steps else {}
