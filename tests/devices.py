"""Simulated devices for the search of batch sizes: time grows with the batch, and memory ends somewhere."""

from __future__ import annotations

import math
import random
from typing import Any

from opensora.datasets.aspect import NUM_PIXELS
from opensora.training.batch_size_search.search import BucketResult, NoData, Outcome, OutOfMemory, Span, Step


class Recorded:
    """The device of a recorded case; `probes` is what it was asked, as the record has it."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.model = case["step_time_model"]
        self.without = [tuple(pair) for pair in case.get("no_data_buckets", ())]
        self.rows = case.get("dataset_samples_per_bucket")
        self.probes: list[list] = []

    def __call__(self, span: Span, batch_size: int) -> Outcome:
        outcome, said = self._outcome(span, batch_size)
        self.probes.append([span.resolution, span.num_frames, batch_size, said])
        return outcome

    def _outcome(self, span: Span, batch_size: int) -> tuple[Outcome, Any]:
        cost = NUM_PIXELS[span.resolution] * span.num_frames / 1e6
        if span[:2] in self.without:
            return NoData(), "no data"
        if self.rows and batch_size * 10 > self.rows:  # 10 batches were taken
            return NoData(self.rows // 10), "too few batches"
        if batch_size * cost > self.model["limit"]:
            return OutOfMemory(), "out of memory"
        seconds = self.model["a"] + self.model["b"] * batch_size * cost ** self.model.get("p", 1)
        return Step(seconds), round(seconds, 6)


class Simulated:
    """A device of random speed and memory; its times are off by up to `noise`, buckets by `spread` from one another.

    `tells`: it says how full its memory was, as accelerators do. `wall` is the share of it at which steps fail.
    """

    def __init__(
        self, rng: random.Random, noise: float = 0.05, spread: float = 0.0, tells: bool = False, wall: float = 1.0
    ) -> None:
        self.rng, self.noise, self.spread, self.tells, self.wall = rng, noise, spread, tells, wall
        self.overhead, self.per_token = rng.uniform(0.05, 1.0), rng.uniform(2e-8, 1e-7)
        self.power = rng.choice([1.0, 1.0, 1.1])
        self.model, self.per_sample = rng.uniform(0.1, 0.5), rng.uniform(1e-9, 2e-8)
        self.own: dict[tuple, float] = {}
        self.calls = 0

    def _own(self, what: str, span: Span) -> float:
        return self.own.setdefault((what, *span[:2]), math.exp(self.rng.uniform(-self.spread, self.spread)))

    def seconds(self, span: Span, batch_size: int) -> float:
        size = span.tokens**self.power * 1e6 ** (1 - self.power)
        return self.overhead + self.per_token * self._own("time", span) * batch_size * size

    def memory(self, span: Span, batch_size: int) -> float:
        return self.model + self.per_sample * self._own("memory", span) * batch_size * span.tokens

    def largest(self, span: Span) -> int:
        """The most samples that fit, of those in the range; below it if none does."""
        alone = self.per_sample * self._own("memory", span) * span.tokens
        return max(min(math.floor((self.wall - self.model) / alone), span.upper), span.lower - 1)

    def __call__(self, span: Span, batch_size: int) -> Outcome:
        self.calls += 1
        memory = self.memory(span, batch_size)
        if memory > self.wall:
            return OutOfMemory()
        seconds = self.seconds(span, batch_size) * (1 + self.rng.uniform(-self.noise, self.noise))
        return Step(seconds, memory if self.tells else None)

    def accepts(self, found: BucketResult, target: float, near: float = 0.98) -> bool:
        """Whether an answer is one that a search may come to: it fits, its time may have been below the target, and
        the next size does not fit, or may not have been. Sizes from `near` of the most that fit on count as that.
        """
        span, most = found.span, self.largest(found.span)
        size = span.lower - 1 if found.batch_size is None else found.batch_size
        if size > most or (size >= span.lower and self.seconds(span, size) * (1 - self.noise) >= target):
            return False
        full = size >= most if size < span.lower else size >= near * most
        return full or self.seconds(span, size + 1) * (1 + self.noise) >= target


RESOLUTIONS = ("144p", "240p", "360p", "480p", "512", "720p", "1024", "1080p")
FRAMES = (1, 17, 34, 51, 102, 204, 408)


def random_config(rng: random.Random, device: Simulated) -> dict[str, dict[int, tuple[int, int]]]:
    """A bucket configuration with guesses up to twice off, and ranges from narrow to as wide as the guess."""
    config: dict[str, dict[int, tuple[int, int]]] = {}
    for resolution in rng.sample(RESOLUTIONS, rng.randint(1, 5)):
        for num_frames in sorted(rng.sample(FRAMES, rng.randint(1, 5))):
            most = device.largest(Span(resolution, num_frames, 1, 600))
            guess = max(1, round(most * rng.uniform(0.5, 1.5)))
            room = rng.choice([guess, max(guess // 2, 1), max(guess // 2, 2), 10 if guess > 5 else 3])
            config.setdefault(resolution, {})[num_frames] = (guess, room)
    return config
