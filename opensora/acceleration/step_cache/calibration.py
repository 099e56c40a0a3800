"""Finds the table of a cache for a model, sampler and size: the cheapest one that keeps to a wanted error.

The predictions of some uncached runs are stored as the products of each with each, a Gram matrix, which tells the error
of any way to foretell some of them from others. Runs in which a single evaluation is foretold tell how much of its
error arrives at the end: those of early ones, which settle what is to be seen, grow. Dynamic programming gives the best
table for each cost; real runs of other prompts say which is the cheapest that keeps to the error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opensora.acceleration.step_cache.cached_sampling import Cache, Interval, Observe, Table
from opensora.errors import ConfigError, MediaError
from opensora.files import replacing

logger = logging.getLogger("opensora")

FORMAT = 2
LONGEST = {"text": 12, "guidance": 24}  # evaluations from one that is computed to the next
MOST_COSTS = 24  # numbers of computed evaluations that are tried for each signal
SPACING = 1.06  # least ratio of the costs of two candidates
TRIED = 6  # evaluations that are foretold alone, at ever larger distances from the start
TRIED_PART = 0.7  # of the run, in which they lie
STEEPEST = 1.0  # power of an evaluation's number by which the growth of its errors may fall
RISK = 3.0  # power of the growth: in logarithms it differs among prompts in proportion to itself
DEVIATIONS, LEAST_MARGIN = 3.0, 4.0  # of the logarithms of errors, and a factor: how far their mean is below the bound
TINY = 1e-6  # relative errors that are not told from rounding
RIDGE = 1e-9  # of the mean product, keeps the fits away from dividing by nothing

# What runs are calibrated on, unless a request names others: the first three are recorded, the others tried.
PROMPTS = (
    "a red circle moving right on a black background", "a lighthouse on a cliff, waves breaking below it",
    "a blue square growing on a white background", "a green triangle moving down on a gray background",
    "a yellow circle standing still on a navy background", "a white dog running across a field of grass",
    "an orange triangle shrinking on a black background", "clouds drifting slowly over a mountain lake at dawn",
    "a purple square moving up on a dark green background",
)  # fmt: skip
RECORDED = 3

Runner = Callable[[int, Cache, Observe | None], Tensor]  # (number of a prompt, cache, observer) -> clean latents


class Profile(NamedTuple):
    """What recorded runs tell of the predictions of N evaluations, relative to the size of what the runs gave.

    `gram` [2 N, 2 N]: mean products of the predictions with text, then of what guidance adds to them. `effects` [N]:
    how much an evaluation weighs in the result. `guided` [N]: whether guidance is on there. `gains` [N]: by what an
    error made there grows until the end, as later predictions answer to it; 1 where that is not known.
    """

    gram: np.ndarray
    effects: np.ndarray
    guided: np.ndarray
    gains: np.ndarray | float = 1.0

    @property
    def ratios(self) -> list[float]:
        """By what the magnitude of the prediction changes from each evaluation to the next."""
        size = np.sqrt(np.diag(self.gram)[: len(self.effects)])
        return (size[1:] / size[:-1]).tolist()


class Found(NamedTuple):
    """The table of a calibration (None: nothing can be left out) and its errors in the runs that tried it."""

    table: Table | None
    errors: list[float]


def calibrate(
    run: Runner, effects: Sequence[float], scale: float, num_prompts: int, max_error: float,
    interval: Interval | None = None,
) -> Found:  # fmt: skip
    """The cheapest table whose relative error of the final latents stays below `max_error`.

    `run(number, cache, observe)` samples prompt `number`; `effects` are those of the sampler, `scale` its guidance's.
    The first prompts are recorded, the others, at least one, decide.
    """
    recorded = min(RECORDED, num_prompts - 1)
    recordings = [record(run, effects, scale, number, interval) for number in range(recorded)]
    profile = mean_profile(recordings)._replace(gains=find_gains(run, recordings, interval))
    exact: dict[int, Tensor] = {}

    def errors_of(table: Table) -> list[float]:
        errors: list[float] = []
        for number in range(recorded, num_prompts):
            if number not in exact:
                exact[number] = run(number, Cache(interval=interval), None)
            errors.append(relative_error(run(number, Cache("table", table, interval=interval), None), exact[number]))
            if errors[-1] > max_error:
                break
        logger.info("cache: %d halves computed, error at most %.4f", table.cost, max(errors))
        return errors

    return cheapest(candidates(profile), errors_of, max_error)


class Recording(NamedTuple):
    """An uncached run: the number of its prompt, what it gave, and its profile without gains."""

    number: int
    made: Tensor
    profile: Profile


def record(
    run: Runner, effects: Sequence[float], scale: float, number: int, interval: Interval | None = None
) -> Recording:
    """An uncached run of a prompt. Its predictions are let go of once their products are known."""
    count = len(effects)
    guided, seen = np.zeros(count, bool), {}

    def observe(index: int, text: Tensor, difference: Tensor | None) -> None:
        seen[index] = text.detach().flatten().cpu()
        if difference is not None:
            guided[index] = True
            seen[count + index] = (scale - 1) * difference.detach().flatten().cpu()

    made = run(number, Cache(interval=interval), observe)
    gram = _products(seen, 2 * count, made.numel()) / made.double().square().sum().item()
    return Recording(number, made, Profile(gram, np.asarray(effects), guided))


def mean_profile(recordings: Sequence[Recording]) -> Profile:
    """Their profile in the mean, without gains."""
    grams = [one.profile.gram for one in recordings]
    return recordings[0].profile._replace(gram=np.mean(grams, axis=0))


def find_gains(run: Runner, recordings: Sequence[Recording], interval: Interval | None = None) -> np.ndarray:
    """The gains [N]: a power of the evaluation's number, fitted to runs in which a single evaluation is foretold."""
    mean = mean_profile(recordings)
    places, grown = [], []
    for k in _tried(mean):
        table = _without(mean, k)
        for number, exact, profile in recordings:
            error = relative_error(run(number, Cache("table", table, interval=interval), None), exact)
            places.append(math.log(k))
            grown.append(math.log((error + TINY) / (predicted_error(profile, table) + TINY)))
    if len(set(places)) < 2:
        return np.ones(len(mean.effects))
    power = float(np.polyfit(places, grown, 1)[0].clip(-STEEPEST, STEEPEST))
    first = math.exp(np.mean(grown) - power * np.mean(places))
    logger.info("cache: an error made in evaluation k arrives %.2f k^%.2f times as large", first, power)
    return first * np.arange(len(mean.effects)).clip(min=1) ** power


def _tried(profile: Profile) -> list[int]:
    """The evaluations that are foretold alone: from the third on, evenly on a logarithmic scale."""
    last = int(TRIED_PART * len(profile.effects))
    if last < 2:
        return []
    first_guided = int(np.argmax(profile.guided))  # nothing foretells it
    return sorted({round(2 * (last / 2) ** (i / (TRIED - 1))) for i in range(TRIED)} - {first_guided})


def _without(profile: Profile, k: int) -> Table:
    """The table that computes all but evaluation k."""
    count = len(profile.effects)
    others = [one for one in range(count) if one != k]
    guided = [one for one in others if profile.guided[one]]
    halves = "".join("0" if one == k else "2" if profile.guided[one] else "1" for one in range(count))
    return Table(halves, _Signal(profile, "text").weights(others), _Signal(profile, "guidance").weights(guided))


def _products(seen: Mapping[int, Tensor], count: int, length: int) -> np.ndarray:
    """The Gram matrix [count, count] of the vectors `seen`, of which the first `length` numbers count."""
    rows = torch.zeros(count, length)
    for index, vector in seen.items():
        part = vector[:length]  # without a variance
        rows[index, : len(part)] = part  # channels that are not guided come last
    total = np.zeros((count, count))
    for part in rows.split(1 << 20, dim=1):
        part = part.double().numpy()
        total += part @ part.T
    return total


def candidates(profile: Profile) -> list[Table]:
    """Tables, the cheapest first, none of which is both dearer and less exact than another by the profile."""
    count = len(profile.effects)
    text, guidance = (_Signal(profile, part) for part in ("text", "guidance"))
    everything = list(range(count))
    rows = []
    for positions in _spread(text.best(everything)):
        halves = ["1" if k in positions else "0" for k in everything]
        shared = [k for k in positions if profile.guided[k]]
        kinds = _spread(guidance.best(shared)) if shared else [[]]
        for both in kinds:
            marked = "".join("2" if k in both else half for k, half in enumerate(halves))
            table = Table(marked, text.weights(positions), guidance.weights(both))
            if table.cost < count + profile.guided.sum():
                rows.append((table.cost, predicted_error(profile, table), table))
    rows.sort(key=lambda row: row[:2])
    kept: list[tuple[int, float, Table]] = []
    for row in rows:
        if not kept or (row[1] < kept[-1][1] and row[0] >= SPACING * kept[-1][0]):
            kept.append(row)
    return [table for _, _, table in kept]


def risks(profile: Profile) -> np.ndarray:
    """The effects [N] on an unlucky prompt: the larger the growth of errors, the more it differs among prompts."""
    return profile.effects * np.asarray(profile.gains) ** RISK


def predicted_error(profile: Profile, table: Table) -> float:
    """The relative error that a table causes if the model's predictions do not depend on its earlier errors.

    With gains it is no error any more but a measure of risk, to compare tables by.
    """
    count = len(profile.effects)
    left, effects = np.zeros(2 * count), risks(profile)
    for offset, least, weights in ((0, 1, table.text), (count, 2, table.guidance)):
        for k in range(count):
            if int(table.halves[k]) >= least or (offset and not profile.guided[k]):
                continue
            left[offset + k] -= effects[k]
            for weight, position in zip(weights[k], table.computed(least, k)[:2], strict=False):
                left[offset + position] += effects[k] * weight
    return math.sqrt(max(left @ profile.gram @ left, 0.0))


class _Signal:
    """How well evaluations of one signal are foretold from the two before, and which are best computed."""

    def __init__(self, profile: Profile, name: str) -> None:
        count = len(profile.effects)
        part = slice(0, count) if name == "text" else slice(count, 2 * count)
        self.gram, self.longest = profile.gram[part, part], LONGEST[name]
        effects = risks(profile)
        self.effects = effects if name == "text" else effects * profile.guided
        self.ridge = RIDGE * max(np.trace(self.gram) / count, 1e-30)
        self.known_costs: dict[tuple[int | None, int, int], dict[int, float]] = {}

    def fit(self, latest: int, before: int | None, wanted: int) -> tuple[float, float]:
        """The weights of two evaluations (one, where there is no other) that come closest to the wanted one."""
        product, size = self.gram[latest].item, self.gram[latest, latest] + self.ridge
        towards = product(wanted)
        if before is None:
            return towards / size, 0.0
        other, size_before, shared = self.gram[before, wanted], self.gram[before, before] + self.ridge, product(before)
        determinant = size * size_before - shared * shared
        first = (towards * size_before - other * shared) / determinant
        return float(first), float((other * size - towards * shared) / determinant)

    def weights(self, positions: Sequence[int]) -> tuple[tuple[float, float], ...]:
        """Those of every evaluation when `positions` are computed; rounded, so that a recipe holds them whole."""
        weights = []
        for k in range(len(self.effects)):
            known = [one for one in positions if one < k][-2:][::-1]
            pair = self.fit(known[0], known[1] if len(known) > 1 else None, k) if known else (1.0, 0.0)
            weights.append(tuple(round(one, 5) for one in pair))
        return tuple(weights)

    def best(self, nodes: Sequence[int]) -> list[list[int]]:
        """For each number of computed evaluations the best choice among `nodes`, the first of them included.

        Dynamic programming: the state is the latest two that are computed, the cost of going on to the next is the
        square of the error that the evaluations between them leave in the result.
        """
        end, most = len(self.effects), len(nodes)
        states: dict[tuple[int | None, int], np.ndarray] = {(None, nodes[0]): _only(most, 1)}
        origin: dict[tuple[int | None, int], list[int | None]] = {}
        finished, last = np.full(most + 1, np.inf), [None] * (most + 1)
        for place, latest in enumerate(nodes):
            befores = [before for before, one in list(states) if one == latest]
            for before in befores:
                reached = states[before, latest]
                costs = self._costs(before, latest, min(end, latest + self.longest))
                for following in [*nodes[place + 1 :], end]:
                    if following - latest > self.longest and following != end:
                        break
                    if following not in costs:
                        continue
                    total = reached + costs[following]
                    if following == end:
                        better = total < finished
                        finished = np.where(better, total, finished)
                        last = [(before, latest) if new else old for new, old in zip(better, last, strict=True)]
                        continue
                    shifted = np.concatenate([[np.inf], total[:-1]])
                    state = (latest, following)
                    known = states.setdefault(state, np.full(most + 1, np.inf))
                    source = origin.setdefault(state, [None] * (most + 1))
                    for number in np.flatnonzero(shifted < known):
                        known[number], source[number] = shifted[number], before
        return [self._path(state, number, origin) for number, state in enumerate(last) if state]

    def _costs(self, before: int | None, latest: int, end: int) -> dict[int, float]:
        """The next computed evaluation -> the cost of foretelling those up to it."""
        if (before, latest, end) not in self.known_costs:
            self.known_costs[before, latest, end] = self._find_costs(before, latest, end)
        return self.known_costs[before, latest, end]

    def _find_costs(self, before: int | None, latest: int, end: int) -> dict[int, float]:
        low = latest if before is None else before
        left, costs = np.zeros(end - low + 1), {latest + 1: 0.0}
        for k in range(latest + 1, end):
            first, second = self.fit(latest, before, k)
            left[k - low] -= self.effects[k]
            left[latest - low] += self.effects[k] * first
            left[0] += self.effects[k] * second
            used = left[: k + 1 - low]
            costs[k + 1] = max(float(used @ self.gram[low : k + 1, low : k + 1] @ used), 0.0)
        return costs

    @staticmethod
    def _path(state: tuple[int | None, int], number: int, origin: Mapping[Any, list[int | None]]) -> list[int]:
        path = []
        before, latest = state
        while True:
            path.append(latest)
            if before is None:
                return path[::-1]
            before, latest, number = origin[before, latest][number], before, number - 1


def _only(most: int, number: int) -> np.ndarray:
    costs = np.full(most + 1, np.inf)
    costs[number] = 0.0
    return costs


def _spread(choices: list[list[int]]) -> list[list[int]]:
    """Some of the choices, evenly spread, if there are more than are worth trying."""
    if len(choices) <= MOST_COSTS:
        return choices
    return [choices[round(i * (len(choices) - 1) / (MOST_COSTS - 1))] for i in range(MOST_COSTS)]


def cheapest(tables: Sequence[Table], errors_of: Callable[[Table], list[float]], max_error: float) -> Found:
    """The cheapest table that keeps to the error, by bisection: a dearer table is taken to be more exact."""
    low, high, found = -1, len(tables), Found(None, [])
    while high - low > 1:
        middle = (low + high) // 2
        errors = errors_of(tables[middle])
        if expected_most(errors) <= max_error and max(errors) <= max_error:
            high, found = middle, Found(tables[middle], errors)
        else:
            low = middle
    return found


def expected_most(errors: Sequence[float]) -> float:
    """An error that few prompts will exceed, as errors are spread evenly on a logarithmic scale."""
    logs = [math.log(max(error, 1e-12)) for error in errors]
    mean = sum(logs) / len(logs)
    spread = math.sqrt(sum((one - mean) ** 2 for one in logs) / max(len(logs) - 1, 1))
    return math.exp(mean) * max(math.exp(DEVIATIONS * spread), LEAST_MARGIN)


def relative_error(made: Tensor, exact: Tensor) -> float:
    """The norm of the difference, relative to the norm of what is right."""
    return ((made - exact).norm() / exact.norm()).item()


def key_of(**what: Any) -> str:
    """A name for a calibration that depends on all it was made for."""
    text = json.dumps({"format": FORMAT, **what}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def remembered(key: str) -> Found | None:
    """What an earlier calibration of this name found."""
    with suppress(OSError, ValueError, KeyError, TypeError, ConfigError):
        stored = json.loads(_file(key).read_text(encoding="utf-8"))
        table = None if stored["table"] is None else Table.of(stored["table"])
        return Found(table, [float(error) for error in stored["errors"]])
    return None


def remember(key: str, found: Found) -> None:
    """Keeps what a calibration found for later runs; where it cannot be written, they calibrate again."""
    table = None if found.table is None else found.table.asdict()
    with suppress(MediaError), replacing(_file(key), make_folders=True) as [temporary]:
        temporary.write_text(json.dumps({"table": table, "errors": found.errors}), encoding="utf-8")


def _file(key: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "opensora", "caching", f"{key}.json").expanduser()
