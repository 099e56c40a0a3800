"""How many steps a run takes, and the learning rate of each."""

from __future__ import annotations

import math
from functools import cached_property

from opensora.config.settings import TrainSettings
from opensora.training.data.loader import Place, Source

LENGTH = "the length of the schedule"


class Schedule:
    """The steps of `batches` batches, of all ranks, from `place` on, where `step` of them are done.

    Without max_steps a run ends with its epochs, whose batches are counted without being read. `left_out` batches gave
    no step, as nothing of them could be read.
    """

    def __init__(
        self, settings: TrainSettings, source: Source, batches: int, step: int = 0, place: Place | None = None
    ) -> None:
        self.settings, self.source, self.batches = settings, source, batches
        self.step, self.place, self.left_out = step, place or Place(), 0

    @property
    def total_steps(self) -> int:
        """The number of steps of the whole run; one may begin in an epoch and end in the next."""
        steps = -(-(self._batches_left - self.left_out) // self.batches)
        return self.settings.max_steps or self.step + max(steps, 0)

    @cached_property
    def _batches_left(self) -> int:
        epochs = range(self.place.epoch, self.settings.epochs)
        return sum(self.source.count(epoch) for epoch in epochs) - self.place.index

    @property
    def decides(self) -> bool:
        """Whether the learning rate depends on the number of steps. In a large table it takes long to count them."""
        return self.settings.lr_schedule != "constant"

    @property
    def expected_steps(self) -> int:
        """About `total_steps`, without the work."""
        epochs = self.settings.epochs * self.source.count(0)
        return self.total_steps if self.decides or self.settings.max_steps else -(-epochs // self.batches)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant or half a cosine down to zero after the last step."""
        warmup = self.settings.warmup_steps or 0
        if step < warmup:
            return self.settings.lr * (step + 1) / (warmup + 1)
        if not self.decides:
            return self.settings.lr
        progress = min((step - warmup) / max(self.total_steps - warmup, 1), 1.0)
        return self.settings.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def prints(self) -> dict[str, str]:
        """The number of steps as a part of the fingerprint; a given max_steps is one already."""
        return {LENGTH: str(self.total_steps)} if self.decides and not self.settings.max_steps else {}
