"""Calibration of a step cache: the cheapest table for a model, sampler and size that keeps to a wanted error.

Some uncached runs are recorded as the Gram matrix of their predictions, which gives the error of any extrapolation of
some of them from others. Runs that skip a single evaluation measure how its error grows until the end. Dynamic
programming finds the best table for each cost; runs of other prompts decide which is the cheapest that keeps to the
error.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from opensora.acceleration.step_cache.cached_sampling import Cache, Interval, Observe
from opensora.acceleration.step_cache.profile import Profile, predicted_error
from opensora.acceleration.step_cache.table import CacheTable
from opensora.acceleration.step_cache.table_search import SignalFit, candidates

logger = logging.getLogger("opensora")

PROBES = 6  # evaluations that are skipped alone, at growing distances from the start
PROBED_PART = 0.7  # of the run, in which they lie
STEEPEST = 1.0  # power of an evaluation's number by which the gains may fall
DEVIATIONS, LEAST_MARGIN = 3.0, 4.0  # of the logarithms of errors, and a factor: how far their mean is below the bound
TINY = 1e-6  # relative errors below this are rounding

# The prompts of a calibration, unless a request names others: the first three are recorded, the others tried.
PROMPTS = (
    "a red circle moving right on a black background", "a lighthouse on a cliff, waves breaking below it",
    "a blue square growing on a white background", "a green triangle moving down on a gray background",
    "a yellow circle standing still on a navy background", "a white dog running across a field of grass",
    "an orange triangle shrinking on a black background", "clouds drifting slowly over a mountain lake at dawn",
    "a purple square moving up on a dark green background",
)  # fmt: skip
RECORDED = 3

Runner = Callable[[int, Cache, Observe | None], Tensor]  # (number of a prompt, cache, observer) -> clean latents


class Calibration(NamedTuple):
    """The table found (None: no evaluation can be skipped) and its errors in the runs that tried it."""

    table: CacheTable | None
    errors: list[float]


def calibrate(
    run: Runner, effects: Sequence[float], scale: float, num_prompts: int, max_error: float,
    interval: Interval | None = None,
) -> Calibration:  # fmt: skip
    """The cheapest table whose relative error of the sample stays below `max_error`.

    `run(number, cache, observe)` samples prompt `number`; `effects` are those of the sampler, `scale` is its guidance
    scale. The first prompts are recorded, the others, at least one, decide.
    """
    recorded = min(RECORDED, num_prompts - 1)
    recordings = [record(run, effects, scale, number, interval) for number in range(recorded)]
    profile = mean_profile(recordings)._replace(gains=find_gains(run, recordings, interval))
    exact: dict[int, Tensor] = {}

    def errors_of(table: CacheTable) -> list[float]:
        errors: list[float] = []
        for number in range(recorded, num_prompts):
            if number not in exact:
                exact[number] = run(number, Cache(interval=interval), None)
            errors.append(relative_error(run(number, Cache("table", table, interval=interval), None), exact[number]))
            if errors[-1] > max_error:
                break
        logger.info("step cache: %d branches computed, error at most %.4f", table.cost, max(errors))
        return errors

    return cheapest(candidates(profile), errors_of, max_error)


class Recording(NamedTuple):
    """An uncached run: the number of its prompt, its sample, and its profile without gains."""

    number: int
    sample: Tensor
    profile: Profile


def record(
    run: Runner, effects: Sequence[float], scale: float, number: int, interval: Interval | None = None
) -> Recording:
    """Records an uncached run of a prompt. Its predictions are freed once their products are computed."""
    count = len(effects)
    guided, predictions = np.zeros(count, bool), {}

    def observe(index: int, cond: Tensor, difference: Tensor | None) -> None:
        predictions[index] = cond.detach().flatten().cpu()
        if difference is not None:
            guided[index] = True
            predictions[count + index] = (scale - 1) * difference.detach().flatten().cpu()

    sample = run(number, Cache(interval=interval), observe)
    gram = _products(predictions, 2 * count, sample.numel()) / sample.double().square().sum().item()
    return Recording(number, sample, Profile(gram, np.asarray(effects), guided))


def mean_profile(recordings: Sequence[Recording]) -> Profile:
    """The mean profile of the recordings, without gains."""
    grams = [one.profile.gram for one in recordings]
    return recordings[0].profile._replace(gram=np.mean(grams, axis=0))


def find_gains(run: Runner, recordings: Sequence[Recording], interval: Interval | None = None) -> np.ndarray:
    """The gains [N]: a power of the evaluation's number, fitted to runs that skip a single evaluation."""
    mean = mean_profile(recordings)
    places, gains = [], []
    for k in _probed(mean):
        table = _without(mean, k)
        for number, exact, profile in recordings:
            error = relative_error(run(number, Cache("table", table, interval=interval), None), exact)
            places.append(math.log(k))
            gains.append(math.log((error + TINY) / (predicted_error(profile, table) + TINY)))
    if len(set(places)) < 2:
        return np.ones(len(mean.effects))
    power = float(np.polyfit(places, gains, 1)[0].clip(-STEEPEST, STEEPEST))
    first = math.exp(np.mean(gains) - power * np.mean(places))
    logger.info("step cache: an error of evaluation k has %.2f k^%.2f times its size in the sample", first, power)
    return first * np.arange(len(mean.effects)).clip(min=1) ** power


def _probed(profile: Profile) -> list[int]:
    """The evaluations that are skipped alone: from the third on, evenly on a logarithmic scale."""
    last = int(PROBED_PART * len(profile.effects))
    if last < 2:
        return []
    first_guided = int(np.argmax(profile.guided))  # nothing to extrapolate from
    return sorted({round(2 * (last / 2) ** (i / (PROBES - 1))) for i in range(PROBES)} - {first_guided})


def _without(profile: Profile, k: int) -> CacheTable:
    """The table that skips evaluation k alone."""
    count = len(profile.effects)
    others = [one for one in range(count) if one != k]
    guided = [one for one in others if profile.guided[one]]
    branches = "".join("0" if one == k else "2" if profile.guided[one] else "1" for one in range(count))
    return CacheTable(
        branches, SignalFit(profile, "text").weights(others), SignalFit(profile, "guidance").weights(guided)
    )


def _products(vectors: Mapping[int, Tensor], count: int, length: int) -> np.ndarray:
    """The Gram matrix [count, count] of the first `length` values of `vectors`."""
    rows = torch.zeros(count, length)
    for index, vector in vectors.items():
        part = vector[:length]  # without a variance
        rows[index, : len(part)] = part  # channels that are not guided come last
    total = np.zeros((count, count))
    for part in rows.split(1 << 20, dim=1):
        part = part.double().numpy()
        total += part @ part.T
    return total


def cheapest(
    tables: Sequence[CacheTable], errors_of: Callable[[CacheTable], list[float]], max_error: float
) -> Calibration:
    """The cheapest table that keeps to the error, by bisection: dearer tables are assumed to be more exact."""
    low, high, found = -1, len(tables), Calibration(None, [])
    while high - low > 1:
        middle = (low + high) // 2
        errors = errors_of(tables[middle])
        if expected_max(errors) <= max_error and max(errors) <= max_error:
            high, found = middle, Calibration(tables[middle], errors)
        else:
            low = middle
    return found


def expected_max(errors: Sequence[float]) -> float:
    """An error that few prompts exceed, if errors are log-normal."""
    logs = [math.log(max(error, 1e-12)) for error in errors]
    mean = sum(logs) / len(logs)
    spread = math.sqrt(sum((one - mean) ** 2 for one in logs) / max(len(logs) - 1, 1))
    return math.exp(mean) * max(math.exp(DEVIATIONS * spread), LEAST_MARGIN)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of `exact`."""
    return ((actual - exact).norm() / exact.norm()).item()
