"""Searches batch sizes for buckets: the largest that fit into memory, or those with equal step times.

A bucket configuration for the search is `{resolution: {num_frames: (guess, range)}}`; trials lie within
`guess +- range`, inclusive, and a range of 0 fixes the batch size without a trial. A trial, `probe(span, batch_size)`,
returns the seconds of a training step, or why there was none. `search_model.py` needs fewer trials.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from opensora.datasets.aspect import NUM_PIXELS, get_num_frames, resolution_name
from opensora.errors import ConfigError

logger = logging.getLogger("opensora")

GRID_STEP = 2
MORE_DATA = "add some, or search without --data-path"
BASE_ASKED = "set base_step_time to the seconds that a step should take, or base to a bucket such as ('240p', 51)"


class Span(NamedTuple):
    """A bucket and its candidate batch sizes, from `lower` to `upper`, inclusive."""

    resolution: str
    num_frames: int
    lower: int
    upper: int

    @property
    def tokens(self) -> float:
        """The size of a sample, up to a factor: pixels x latent frames, 17 frames being 5 of these."""
        chunks, rest = divmod(self.num_frames, 17)
        return NUM_PIXELS[self.resolution] * (5 * chunks + math.ceil(rest / 4))

    def __str__(self) -> str:
        return f"{self.resolution}, {self.num_frames} frame{'s' * (self.num_frames > 1)}"


@dataclass(frozen=True)
class Step:
    """A training step that ran: its seconds, and its peak share of the device memory, if known."""

    seconds: float
    memory: float | None = None


@dataclass(frozen=True)
class OutOfMemory:
    """A training step that did not fit."""


@dataclass(frozen=True)
class NoData:
    """The table has too few rows for the batch; the largest possible batch is `most`."""

    most: int = 0


Outcome = Step | OutOfMemory | NoData
Probe = Callable[[Span, int], Outcome]


@dataclass(frozen=True)
class BucketResult:
    """The batch size found for a bucket and the seconds of its step; None and 0 if no size will do.

    limit: what keeps it from being larger: "memory", "time", "data", or the end of the "range"
    """

    span: Span
    batch_size: int | None
    seconds: float
    limit: str


Method = Callable[[Probe, Span, float], BucketResult]


def bisect(probe: Probe, span: Span, target: float) -> BucketResult:
    """The search of Open-Sora 1.2: halves the range, the lower middle first, at every trial.

    Of the sizes tried with a step below `target` seconds the one nearest to it wins; without a target (infinity) the
    largest. A table without any row for the bucket ends the search at once.
    """
    low, high, limit = span.lower, span.upper, "range"
    steps: dict[int, float] = {}
    while low <= high:
        middle = (low + high) // 2
        outcome = probe(span, middle)
        if isinstance(outcome, Step) and meets_target(outcome, target):
            steps[middle] = outcome.seconds
            low = middle + 1
            continue
        high, limit = middle - 1, limit_of(outcome)
        if outcome == NoData(0):
            break
    return _nearest_below(span, steps, target, limit)


def grid(probe: Probe, span: Span, target: float) -> BucketResult:
    """The search of Open-Sora 1.1: the limit of memory by halving, then every second size up to it.

    The size with the time nearest to `target` wins, on either side; without a target (infinity) the largest. The upper
    end itself is never tried, unless it is the only size.
    """
    return grid_search(probe, span, target, GRID_STEP)


def grid_search(probe: Probe, span: Span, target: float, step: int) -> BucketResult:
    """`grid` with any distance between the sizes tried."""
    low, high, steps, limit = span.lower, max(span.upper, span.lower + 1), {}, "range"
    while low < high:
        middle = (low + high) // 2
        outcome = probe(span, middle)
        if isinstance(outcome, Step):
            steps[middle] = outcome.seconds
            low = middle + 1
        else:
            high, limit = middle, limit_of(outcome)
    if not steps:
        return BucketResult(span, None, 0.0, limit)
    for size in range(span.lower, max(steps), step):
        if size not in steps and isinstance(outcome := probe(span, size), Step):
            steps[size] = outcome.seconds
    best = max(steps) if target == math.inf else min(steps, key=lambda size: abs(steps[size] - target))
    return BucketResult(span, best, steps[best], limit if best == max(steps) else "time")


def _nearest_below(span: Span, steps: Mapping[int, float], target: float, limit: str) -> BucketResult:
    if not steps:
        return BucketResult(span, None, 0.0, limit)
    best = max(steps) if target == math.inf else max(steps, key=lambda size: (steps[size], size))
    return BucketResult(span, best, steps[best], limit)


def meets_target(outcome: Outcome, target: float) -> bool:
    """Whether the step ran in less than `target` seconds."""
    return isinstance(outcome, Step) and outcome.seconds < target


def limit_of(outcome: Outcome) -> str:
    """What limited an outcome that is not good: "time", "memory" or "data"."""
    return {Step: "time", OutOfMemory: "memory", NoData: "data"}[type(outcome)]


@dataclass(frozen=True)
class SearchPlan:
    """What to search: the spans in order, including fixed ones, and the goal.

    `base` is the bucket whose largest batch gives the time that the others aim at; without one `target` is that time.
    """

    spans: tuple[Span, ...]
    base: Span | None = None
    target: float | None = None

    @property
    def order(self) -> list[Span]:
        """The spans that need trials, the base first; with a range of 0, only the base does."""
        others = [span for span in self.spans if span != self.base and span.lower < span.upper]
        return [self.base, *others] if self.base else others


def make_plan(
    config: Mapping[Any, Any] | None, base: Sequence[Any] | None, base_step_time: float | None, resolution: str | None
) -> SearchPlan:
    """The plan of a configuration, restricted to one `resolution` if given. Raises ConfigError.

    `base_step_time` counts more than `base`.
    """
    spans = tuple(_spans(config or {}))
    if not spans:
        raise ConfigError("the configuration has no bucket_config; write {resolution: {num_frames: (guess, range)}}")
    if resolution is not None:
        wanted = resolution_name(resolution)
        spans = tuple(span for span in spans if span.resolution == wanted)
        if not spans:
            raise ConfigError(f"bucket_config has no resolution {wanted}; choose one that it has")
    if base_step_time is not None:
        return SearchPlan(spans, target=float(base_step_time))
    if base is None:
        raise ConfigError(f"the search has no target step time; {BASE_ASKED}")
    if not isinstance(base, tuple | list) or len(base) != 2:
        raise ConfigError(f"base must be (resolution, number of frames); it is {base!r}")
    key = (resolution_name(base[0]), get_num_frames(base[1]))
    for span in spans:
        if span[:2] == key:
            return SearchPlan(spans, base=span)
    among = f"searched at --resolution {resolution}" if resolution else "in bucket_config"
    raise ConfigError(f"base {key[0]}, {key[1]} frames is not {among}; {BASE_ASKED}")


def _spans(config: Mapping[Any, Any]) -> Iterator[Span]:
    for name, table in config.items():
        resolution = resolution_name(name)
        if not isinstance(table, Mapping):
            raise ConfigError(f"bucket_config: {resolution} must be {{num_frames: (guess, range)}}; it is {table!r}")
        for num_frames, pair in table.items():
            where = f"bucket_config: {resolution}, {num_frames!r} frames"
            if type(num_frames) is not int or num_frames < 1:
                raise ConfigError(f"{where}: the number of frames must be an integer of at least 1")
            whole = isinstance(pair, tuple | list) and len(pair) == 2 and all(type(part) is int for part in pair)
            if not whole or pair[0] < 1 or pair[1] < 0:
                raise ConfigError(f"{where}: the search takes (guess, range), two integers; it is {pair!r}")
            guess, room = pair
            yield Span(resolution, num_frames, max(guess - room, 1), guess + room)


def search(plan: SearchPlan, probe: Probe, method: Method) -> list[BucketResult]:
    """Searches `plan.order`; results in that order. Raises ConfigError when the base has no batch size."""
    target, found = plan.target, []
    for span in plan.order:
        bounds = f"lower_bound={span.lower}, upper_bound={span.upper}"
        head = f"resolution={span.resolution}, num_frames={span.num_frames}, {bounds}"
        logger.info("[Search BS] Benchmarking %s", head)
        one = method(_logged(probe), span, math.inf if target is None else target)
        if target is None:
            if one.batch_size is None:
                raise ConfigError(f"base {span} has no batch size: {remedy(one)}")
            target = one.seconds
        found.append(one)
    return found


def _logged(probe: Probe) -> Probe:
    """A probe that logs each trial."""

    def logged(span: Span, batch_size: int) -> Outcome:
        outcome = probe(span, batch_size)
        text = f"{outcome.seconds:.2f} s" if isinstance(outcome, Step) else f"out of {limit_of(outcome)}"
        if isinstance(outcome, Step) and outcome.memory is not None:
            text += f", {outcome.memory:.0%} of the memory"
        logger.info("[Search BS]   batch size %d: %s", batch_size, text)
        return outcome

    return logged


def remedy(found: BucketResult) -> str:
    """Why a bucket has no batch size, and what to do about it."""
    lower, smaller = found.span.lower, "" if found.span.lower == 1 else "a larger range (smaller batches) or "
    return {
        "memory": f"out of memory at {lower}; try {smaller}grad_checkpoint=True or a smaller resolution",
        "time": f"a step of {lower} takes longer than the target; try {smaller}a longer base_step_time",
        "data": f"the table has too few rows for it; {MORE_DATA}",
        "range": "its range is empty",
    }[found.limit]
