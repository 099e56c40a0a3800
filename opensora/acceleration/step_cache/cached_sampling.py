"""Sampling with a step cache: some evaluations of the model are skipped, their predictions extrapolated.

`CachedDenoiser` stands between a sampler and its model. For every evaluation a rule says how many guidance branches are
computed; the others are weighted sums of the latest two computed ones. Predictions are [B, C, T, H, W].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora.acceleration.step_cache.rules import (
    MAG_THRESHOLD,
    TEA_THRESHOLD,
    Rule,
    TableRule,
    TeaRule,
    mag_table,
)
from opensora.acceleration.step_cache.table import CacheTable
from opensora.errors import ConfigError
from opensora.schedulers.common import SamplerState
from opensora.schedulers.guidance import Conditioning, Denoiser, GuidedDenoiser, num_branches
from opensora.schedulers.sampler import Sampler

Interval = tuple[float, float]  # of the run: 0 is its first evaluation, 1 its end
Observe = Callable[[int, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class Cache:
    """The settings of a step cache: `method` "none", "table", "tea" or "mag", and guidance only in an `interval`."""

    method: str = "none"
    table: CacheTable | None = None
    threshold: float | None = None
    interval: Interval | None = None
    ratios: Sequence[float] | None = None  # for "mag", instead of the published ones

    @property
    def is_exact(self) -> bool:
        """Whether every evaluation is computed in full."""
        return self.method == "none" and self.interval is None


@torch.no_grad()
def steps(
    scheduler: Sampler, model: Denoiser, noise: Tensor, cond: Conditioning, null: Conditioning | None, cache: Cache,
    observe: Observe | None = None, counter: list[int] | None = None,
    sequential_cfg: bool = False, precompute: bool = False, **options: Any,
) -> Iterator[SamplerState]:  # fmt: skip
    """`scheduler.steps(model, noise, cond, null, **options)` with a step cache.

    `observe(number, cond, difference)` is called after every evaluation with the conditional prediction and, if both
    branches are computed, its difference to the unconditional one. `counter` collects the branches computed in each
    evaluation. Raises ConfigError if the cache does not fit the sampler or the model.
    """
    guidance = {"sequential_cfg": sequential_cfg, "precompute": precompute}
    if cache.is_exact and observe is None and counter is None:
        yield from scheduler.steps(model, noise, cond, null, **guidance, **options)
        return
    if options.get("resume") is not None:
        raise ConfigError("a step cache cannot resume a draft; use --cache none with drafts")
    channels = scheduler.guided_channels(noise.shape[1])
    cond_only = guided = GuidedDenoiser(model, cond, None, 1, channels, precompute=precompute)
    if null is not None and scheduler.num_branches == 2:
        guided = GuidedDenoiser(
            model, cond, null, scheduler.cfg_scale, channels, sequential=sequential_cfg, precompute=precompute
        )
    number = scheduler.num_evaluations
    rule = _rule(cache, model, cond, number, num_branches(guided.scale))
    cached = CachedDenoiser(cond_only, guided, rule, number, cache.interval, observe, counter)
    yield from scheduler.steps(cached, noise, {}, guidance_scale=1.0, **options)


def sample(*args: Any, **options: Any) -> Tensor:
    """The sample [B, C, T, H, W]: the `x` of the last of `steps`, which takes the same arguments."""
    for state in steps(*args, **options):  # noqa: B007
        pass
    return state.x


@torch.no_grad()
def effects(scheduler: Sampler, channels: int, sizes: Mapping[str, Any]) -> list[float]:
    """The weight of each evaluation's prediction in the sample, [num_evaluations].

    Samples one value in each of num_evaluations rows, where row k gets a prediction of 1 in evaluation k alone.
    """
    number, done = scheduler.num_evaluations, 0

    def impulse(x: Tensor, timestep: Tensor, **_: Any) -> Tensor:
        nonlocal done
        out = x.new_zeros(len(x), 2 * x.shape[1], *x.shape[2:])
        out[done, : x.shape[1]] = 1
        done += 1
        return out

    noise = torch.zeros(number + 1, channels, 1, 1, 1)
    source = lambda: torch.zeros_like(noise)  # noqa: E731
    sampled = scheduler.sample(impulse, noise, {}, guidance_scale=1.0, source=source, **sizes)
    return (sampled - sampled[-1:])[:number, 0, 0, 0, 0].tolist()


class CachedDenoiser:
    """A guided denoiser that computes what its rule says. One object serves one run of a sampler.

    Both branches are computed, whatever the rule says, if there is nothing to extrapolate from, and if other frames are
    given than in the evaluation before.
    """

    def __init__(
        self, cond_only: GuidedDenoiser, guided: GuidedDenoiser, rule: Rule, num_evaluations: int,
        interval: Interval | None = None, observe: Observe | None = None, counter: list[int] | None = None,
    ) -> None:  # fmt: skip
        self.cond_only, self.guided, self.rule = cond_only, guided, rule
        self.observe, self.counter = observe, counter
        first, end = (0.0, 1.0) if interval is None else interval
        guides = num_branches(guided.scale) == 2
        self.guided_at = [guides and first <= k / num_evaluations < end for k in range(num_evaluations)]
        self.evaluations = 0
        self.masks: dict[str, Tensor] = {}
        self.cond, self.difference = Signal("text"), Signal("guidance")

    def __call__(self, x: Tensor, timestep: Tensor, **masks: Tensor) -> Tensor:
        number, self.evaluations = self.evaluations, self.evaluations + 1
        if not _equal(masks, self.masks):
            self.cond.clear()
            self.difference.clear()
        self.masks = masks
        branches = self._branches(number, x, timestep, masks)
        if self.counter is not None:
            self.counter.append(branches)
        if branches == 2:
            return self._compute_both(number, x, timestep, masks)
        if branches == 1:
            cond = self.cond_only(x, timestep, **masks)
            self.cond.append(number, cond)
        else:
            cond = self.cond.extrapolated(number, self.rule)
        if self.observe is not None:
            self.observe(number, cond, None)
        if not self.guided_at[number]:
            return cond
        out = cond.clone()
        difference = self.difference.extrapolated(number, self.rule)
        out[:, : difference.shape[1]] += (self.guided.scale - 1) * difference
        return out

    def _branches(self, number: int, x: Tensor, timestep: Tensor, masks: Mapping[str, Tensor]) -> int:
        """The branches to compute in this evaluation."""
        guides = self.guided_at[number]
        branches = self.rule(number, x, timestep, masks)
        if not self.cond.computed or (guides and not self.difference.computed):
            branches = 2
        return branches if guides else min(branches, 1)

    def _compute_both(self, number: int, x: Tensor, timestep: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        cond, uncond = self.guided.branches(x, timestep, **masks)
        difference = (cond - uncond)[:, : self.guided.channels]
        self.cond.append(number, cond)
        self.difference.append(number, difference)
        if self.observe is not None:
            self.observe(number, cond, difference)
        return self.guided.combine(cond, uncond)


class Signal:
    """The latest two computed values of a signal, with the numbers of their evaluations."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.computed: deque[tuple[int, Tensor]] = deque(maxlen=2)

    def append(self, number: int, value: Tensor) -> None:
        self.computed.appendleft((number, value))

    def clear(self) -> None:
        self.computed.clear()

    def extrapolated(self, number: int, rule: Rule) -> Tensor:
        """The weighted sum that replaces the value of evaluation `number`."""
        weights = rule.weights(self.name, number, [one for one, _ in self.computed])
        pairs = zip(weights, (value for _, value in self.computed), strict=False)
        return sum(weight * value for weight, value in pairs if weight)


def _equal(masks: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> bool:
    return masks.keys() == before.keys() and all(torch.equal(mask, before[name]) for name, mask in masks.items())


def _rule(cache: Cache, model: Any, cond: Conditioning, number: int, branches: int) -> Rule:
    """The rule of a run of `number` evaluations with so many branches. Raises ConfigError."""
    if cache.method == "tea":
        return TeaRule(model, cond, number, TEA_THRESHOLD if cache.threshold is None else cache.threshold)
    if cache.method == "mag":
        threshold = MAG_THRESHOLD if cache.threshold is None else cache.threshold
        return TableRule(mag_table(number, threshold, cache.ratios, branches))
    if cache.method == "none":
        return TableRule(CacheTable.reuse(str(branches) * number))
    if cache.table is None:
        raise ConfigError("cache 'table' needs a cache_table, as recipes hold it; use --cache auto to find one")
    if len(cache.table.branches) != number:
        found = len(cache.table.branches)
        raise ConfigError(f"cache_table is for {found} evaluations, but the sampler makes {number}; use --cache auto")
    return TableRule(cache.table)
