"""How many steps a run takes, and the learning rate of each."""

from __future__ import annotations

import math

from opensora.settings import TrainSettings
from opensora.training.data import Place, Source


def steps_left(source: Source, place: Place, batches: int, epochs: int) -> int:
    """Steps of so many `batches` from `place` to the end of the epochs; a step may begin in one and end in the next."""
    left = sum(source.count(epoch) for epoch in range(place.epoch, epochs)) - place.index
    return max(-(-left // batches), 0)


def learning_rate(settings: TrainSettings, step: int, total_steps: int) -> float:
    """Linear warm-up, then constant or half a cosine down to zero after the last step."""
    warmup = settings.warmup_steps or 0
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    if settings.lr_schedule == "constant":
        return settings.lr
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
