"""Opt-in approximations around a denoiser: evaluations of the model that are foretold instead of computed.

A sampler asks for one prediction after the other. `Cached` stands between it and the model: for every evaluation a
rule says how many halves of guidance the model computes, two, one (with the text) or none; what is not computed is a
weighted sum of the latest two that were. No model and no sampler knows about it.

Rules: a fixed table, found by calibration (`calibration.py`) or from the ratios of MagCache (Ma et al. 2025,
arXiv:2506.09045), and TeaCache (Liu et al. 2024, arXiv:2411.19108). Predictions are [B, C, T, H, W].
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora.errors import ConfigError
from opensora.models.layers.blocks import modulated, rows_of
from opensora.schedulers.common import SamplerState
from opensora.schedulers.guidance import Conditioning, Denoiser, GuidedDenoiser, num_branches
from opensora.schedulers.sampler import Sampler

Weights = tuple[tuple[float, float], ...]
Interval = tuple[float, float]  # of the run, 0 its first evaluation and 1 its end

# Published for Open-Sora 1.2 at 30 steps. TeaCache: how the output changes with the input, highest power first.
# MagCache: squares of the ratios by which the residual's magnitude changes from each evaluation to the next.
TEA_POLYNOMIAL = (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.0484426240)
MAG_SQUARES = (
    0.93359, 0.96484, 0.99609, 1.0, 0.99609, 0.99609, 0.99219, 1.0, 1.0, 0.99609, 0.99219, 1.0, 0.99219, 0.99609,
    0.99219, 0.99609, 0.99609, 0.99609, 0.99219, 0.99219, 0.99219, 0.98828, 0.98828, 0.98438, 0.98438, 0.97656, 0.97656,
    0.96484, 0.96484,
)  # fmt: skip
TEA_THRESHOLD, MAG_THRESHOLD = 0.1, 0.06  # the published slow settings
MAG_FAST, MAG_MOST_SKIPPED = 0.12, 3  # from this threshold on so many may be skipped in a row, else one
MAG_WARM_UP = 0.2  # share of the run that is computed at its start


@dataclass(frozen=True)
class Table:
    """What is computed in each evaluation of a run: "2" both halves of guidance, "1" the one with text, "0" neither.

    `text` and `guidance` hold, for every evaluation, what multiplies the latest and the second latest computed value
    where that signal, the prediction with text or its difference to that without, is not computed.
    """

    halves: str
    text: Weights
    guidance: Weights

    def __post_init__(self) -> None:
        lengths = {len(self.halves), len(self.text), len(self.guidance)}
        if len(lengths) != 1 or not self.halves or set(self.halves) - set("012") or self.halves[0] == "0":
            raise ConfigError("cache_table must begin with a computed evaluation and have one entry for each")
        if not all(len(pair) == 2 and all(map(math.isfinite, pair)) for pair in (*self.text, *self.guidance)):
            raise ConfigError("cache_table must have two finite numbers for each evaluation")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Table:
        """The table of a configuration or recipe. Raises ConfigError."""
        try:
            pairs = ([tuple(map(float, pair)) for pair in given[name]] for name in ("text", "guidance"))
            return cls(str(given["halves"]), *map(tuple, pairs))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"cache_table is no table of a calibration ({error!r}); use --cache auto") from error

    @classmethod
    def plain(cls, halves: str) -> Table:
        """A table that takes the latest computed value as it is."""
        same = ((1.0, 0.0),) * len(halves)
        return cls(halves, same, same)

    @property
    def cost(self) -> int:
        """Halves that are computed in all."""
        return sum(map(int, self.halves))

    def asdict(self) -> dict[str, Any]:
        """Of texts, numbers and lists alone."""
        pairs = {name: [list(pair) for pair in getattr(self, name)] for name in ("text", "guidance")}
        return {"halves": self.halves, **pairs}

    def computed(self, least: int, before: int) -> list[int]:
        """The evaluations before number `before` in which at least that many halves are computed, latest first."""
        return [k for k in range(before - 1, -1, -1) if int(self.halves[k]) >= least]


@dataclass(frozen=True)
class Cache:
    """An approximation that was asked for: `method` "none", "table", "tea" or "mag", and guidance in an `interval`."""

    method: str = "none"
    table: Table | None = None
    threshold: float | None = None
    interval: Interval | None = None
    ratios: Sequence[float] | None = None  # for "mag", instead of the published ones

    @property
    def is_exact(self) -> bool:
        """Whether nothing is approximated."""
        return self.method == "none" and self.interval is None


Observe = Callable[[int, Tensor, Tensor | None], None]


@torch.no_grad()
def steps(
    scheduler: Sampler, model: Denoiser, noise: Tensor, cond: Conditioning, null: Conditioning | None, cache: Cache,
    observe: Observe | None = None, counter: list[int] | None = None,
    sequential_cfg: bool = False, precompute: bool = False, **options: Any,
) -> Iterator[SamplerState]:  # fmt: skip
    """`scheduler.steps(model, noise, cond, null, **options)` under a cache.

    `observe` is told of every evaluation with both halves: its number, the prediction with text and its difference to
    the one without. `counter` is filled with the halves computed in each evaluation. Raises ConfigError where the
    cache does not fit the sampler or the model.
    """
    guidance = {"sequential_cfg": sequential_cfg, "precompute": precompute}
    if cache.is_exact and observe is None and counter is None:
        yield from scheduler.steps(model, noise, cond, null, **guidance, **options)
        return
    if options.get("resume") is not None:
        raise ConfigError("a step cache cannot resume a draft; use --cache none with drafts")
    number = scheduler.num_evaluations
    branches = 1 if null is None else scheduler.num_branches
    rule = _rule(cache, model, cond, number, branches)
    channels = scheduler.guided_channels(noise.shape[1])
    cond_only = GuidedDenoiser(model, cond, None, 1, channels, precompute=precompute)
    guided = cond_only
    if branches == 2:
        guided = GuidedDenoiser(
            model, cond, null, scheduler.cfg_scale, channels, sequential=sequential_cfg, precompute=precompute
        )
    cached = Cached(cond_only, guided, rule, number, cache.interval)
    cached.observe, cached.counter = observe, counter
    yield from scheduler.steps(cached, noise, {}, None, guidance_scale=1.0, **options)


def sample(*args: Any, **options: Any) -> Tensor:
    """The sample [B, C, T, H, W]: the `x` of the last of `steps`, which takes the same arguments."""
    for state in steps(*args, **options):  # noqa: B007
        pass
    return state.x


@torch.no_grad()
def effects(scheduler: Sampler, channels: int, sizes: Mapping[str, Any]) -> list[float]:
    """How much each prediction weighs in what a sampler gives, [evaluations].

    The sampler works on one value for each evaluation; row k is given a prediction of 1 in evaluation k alone.
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


class Cached:
    """A denoiser, guided already, that computes what its rule says. One object serves one run of a sampler.

    `rule(number, x, timestep, frames)` gives the halves to compute, `rule.weights(signal, number, kept)` the weights of
    the values that were computed in the evaluations `kept`. More is computed than the rule says where nothing is known
    yet, and where other frames are given than before.
    """

    def __init__(
        self, cond_only: GuidedDenoiser, guided: GuidedDenoiser, rule: Any, number: int,
        interval: Interval | None = None,
    ) -> None:  # fmt: skip
        self.cond_only, self.guided, self.rule = cond_only, guided, rule
        first, end = (0.0, 1.0) if interval is None else interval
        guides = num_branches(guided.scale) == 2
        self.guided_at = [guides and first <= k / number < end for k in range(number)]
        self.index, self.told = 0, {}
        self.text, self.guidance = Signal("text"), Signal("guidance")
        self.observe: Observe | None = None
        self.counter: list[int] | None = None

    def __call__(self, x: Tensor, timestep: Tensor, **frames: Tensor) -> Tensor:
        number, self.index = self.index, self.index + 1
        if self._told_otherwise(frames):
            self.text.forget()
            self.guidance.forget()
        guides = self.guided_at[number]
        halves = self.rule(number, x, timestep, frames)
        if not self.text.kept or (guides and not self.guidance.kept):
            halves = 2
        halves = halves if guides else min(halves, 1)
        if self.counter is not None:
            self.counter.append(halves)
        if halves == 2:
            return self._compute_both(number, x, timestep, frames)
        if halves == 1:
            text = self.cond_only(x, timestep, **frames)
            self.text.keep(number, text)
        else:
            text = self.text.foretell(number, self.rule)
        if self.observe is not None:
            self.observe(number, text, None)
        if not guides:
            return text
        out = text.clone()
        difference = self.guidance.foretell(number, self.rule)
        out[:, : difference.shape[1]] += (self.guided.scale - 1) * difference
        return out

    def _compute_both(self, number: int, x: Tensor, timestep: Tensor, frames: Mapping[str, Tensor]) -> Tensor:
        text, bare = self.guided.branches(x, timestep, **frames)
        difference = (text - bare)[:, : self.guided.channels]
        self.text.keep(number, text)
        self.guidance.keep(number, difference)
        if self.observe is not None:
            self.observe(number, text, difference)
        return self.guided.combine(text, bare)

    def _told_otherwise(self, frames: Mapping[str, Tensor]) -> bool:
        before, self.told = self.told, dict(frames)
        return before.keys() != frames.keys() or any(not torch.equal(before[name], frames[name]) for name in frames)


class Signal:
    """The latest two computed values of what a run predicts, with the numbers of their evaluations."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kept: deque[tuple[int, Tensor]] = deque(maxlen=2)

    def keep(self, number: int, value: Tensor) -> None:
        self.kept.appendleft((number, value))

    def forget(self) -> None:
        self.kept.clear()

    def foretell(self, number: int, rule: Any) -> Tensor:
        """What stands in for the value of evaluation `number`."""
        weights = rule.weights(self.name, number, [one for one, _ in self.kept])
        pairs = zip(weights, (value for _, value in self.kept), strict=False)
        return sum(weight * value for weight, value in pairs if weight)


class TableRule:
    """Computes what a table says."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __call__(self, number: int, x: Tensor, timestep: Tensor, frames: Mapping[str, Tensor]) -> int:
        return int(self.table.halves[number])

    def weights(self, signal: str, number: int, kept: Sequence[int]) -> tuple[float, float]:
        """The table's own, as long as what was kept is what they were fitted to; else the latest value as it is."""
        fitted = self.table.computed(1 if signal == "text" else 2, number)[:2]
        return getattr(self.table, signal)[number] if list(kept) == fitted else (1.0, 0.0)


class TeaRule:
    """TeaCache: nothing is computed while the input of the first attention has changed little since it last was."""

    def __init__(self, model: Any, cond: Mapping[str, Any], number: int, threshold: float) -> None:
        if not hasattr(model, "embed") or not hasattr(model, "spatial_blocks"):
            raise ConfigError("cache 'tea' reads the first block of STDiT3; use --cache auto with other models")
        self.model, self.cond, self.number, self.threshold = model, cond, number, threshold
        self.before: Tensor | None = None
        self.changed = 0.0

    def __call__(self, number: int, x: Tensor, timestep: Tensor, frames: Mapping[str, Tensor]) -> int:
        now = first_input(self.model, x, timestep, self.cond, frames)
        before, self.before = self.before, now
        if before is not None and 0 < number < self.number - 1:
            change = ((now - before).abs().mean() / before.abs().mean()).item()
            self.changed += polynomial(TEA_POLYNOMIAL, change)
            if self.changed < self.threshold:
                return 0
        self.changed = 0.0
        return 2

    def weights(self, signal: str, number: int, kept: Sequence[int]) -> tuple[float, float]:
        return (1.0, 0.0)


def first_input(
    model: Any, x: Tensor, timestep: Tensor, cond: Mapping[str, Any], frames: Mapping[str, Tensor]
) -> Tensor:
    """What the first attention of an STDiT3 sees: its tokens [B, T, S, C], normalised and modulated."""
    told = (cond.get(name) for name in ("fps", "height", "width"))
    tokens, modulation = model.embed(x, timestep, frames.get("x_mask"), *told)
    block = model.spatial_blocks[0]
    shift, scale = rows_of(block.scale_shift_table + modulation.blocks)[:2]
    return modulated(tokens, shift, scale)


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """The value at x, highest power first (Horner)."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def mag_table(
    number: int, threshold: float = MAG_THRESHOLD, ratios: Sequence[float] | None = None, halves: int = 2
) -> Table:
    """MagCache's table for a run of `number` evaluations: skipped while the ratios say that the error stays small.

    `ratios` say by what the magnitude of the prediction changes from each evaluation to the next, at any number of
    evaluations; by default those published for Open-Sora 1.2.
    """
    ratios = [math.sqrt(one) for one in MAG_SQUARES] if ratios is None else ratios
    per_step, most_skipped = len(ratios) / max(number - 1, 1), MAG_MOST_SKIPPED if threshold >= MAG_FAST else 1
    kinds, product, error, skipped = [str(halves)], 1.0, 0.0, 0
    for k in range(1, number):
        ratio = ratios[min(int((k - 0.5) * per_step), len(ratios) - 1)]
        product *= ratio**per_step if per_step < 1 else ratio
        error += abs(1 - product)
        skips = k >= MAG_WARM_UP * number and error <= threshold and skipped < most_skipped
        kinds.append("0" if skips else str(halves))
        if skips:
            skipped += 1
        else:
            product, error, skipped = 1.0, 0.0, 0
    return Table.plain("".join(kinds))


def _rule(cache: Cache, model: Any, cond: Mapping[str, Any], number: int, halves: int) -> Any:
    if cache.method == "tea":
        return TeaRule(model, cond, number, TEA_THRESHOLD if cache.threshold is None else cache.threshold)
    if cache.method == "mag":
        threshold = MAG_THRESHOLD if cache.threshold is None else cache.threshold
        return TableRule(mag_table(number, threshold, cache.ratios, halves))
    if cache.method == "none":
        return TableRule(Table.plain(str(halves) * number))
    if cache.table is None:
        raise ConfigError("cache 'table' needs a cache_table, as recipes hold it; use --cache auto to find one")
    if len(cache.table.halves) != number:
        made = len(cache.table.halves)
        raise ConfigError(f"cache_table is for {made} evaluations, but the sampler makes {number}; use --cache auto")
    return TableRule(cache.table)
