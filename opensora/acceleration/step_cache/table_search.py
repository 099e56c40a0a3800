"""The candidates of a calibration: by dynamic programming, the table of the least predicted error for each cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opensora.acceleration.step_cache.profile import Profile, predicted_error
from opensora.acceleration.step_cache.table import CacheTable

MAX_SKIP = {"text": 12, "guidance": 24}  # evaluations from a computed one to the next
MAX_COSTS = 24  # numbers of computed evaluations that are tried for each signal
SPACING = 1.06  # least ratio of the costs of two candidates
RIDGE = 1e-9  # of the mean product, keeps the fits away from dividing by nothing


def candidates(profile: Profile) -> list[CacheTable]:
    """Tables, the cheapest first; by the profile, each is more exact than all cheaper ones."""
    count = len(profile.effects)
    text, guidance = (SignalFit(profile, part) for part in ("text", "guidance"))
    everything = list(range(count))
    rows = []
    for positions in _spread(text.best(everything)):
        computed = ["1" if k in positions else "0" for k in everything]
        shared = [k for k in positions if profile.guided[k]]
        kinds = _spread(guidance.best(shared)) if shared else [[]]
        for both in kinds:
            marked = "".join("2" if k in both else one for k, one in enumerate(computed))
            table = CacheTable(marked, text.weights(positions), guidance.weights(both))
            if table.cost < count + profile.guided.sum():
                rows.append((table.cost, predicted_error(profile, table), table))
    rows.sort(key=lambda row: row[:2])
    kept: list[tuple[int, float, CacheTable]] = []
    for row in rows:
        if not kept or (row[1] < kept[-1][1] and row[0] >= SPACING * kept[-1][0]):
            kept.append(row)
    return [table for _, _, table in kept]


class SignalFit:
    """How well evaluations of one signal are extrapolated from the two before, and which are best computed."""

    def __init__(self, profile: Profile, name: str) -> None:
        count = len(profile.effects)
        part = slice(0, count) if name == "text" else slice(count, 2 * count)
        self.gram, self.max_skip = profile.gram[part, part], MAX_SKIP[name]
        effects = profile.risks
        self.effects = effects if name == "text" else effects * profile.guided
        self.ridge = RIDGE * max(np.trace(self.gram) / count, 1e-30)
        self.known_costs: dict[tuple[int | None, int, int], dict[int, float]] = {}

    def fit(self, latest: int, before: int | None, wanted: int) -> tuple[float, float]:
        """The least-squares weights of two evaluations (or one) that extrapolate to the wanted one."""
        product, size = self.gram[latest].item, self.gram[latest, latest] + self.ridge
        towards = product(wanted)
        if before is None:
            return towards / size, 0.0
        other, size_before, shared = self.gram[before, wanted], self.gram[before, before] + self.ridge, product(before)
        determinant = size * size_before - shared * shared
        first = (towards * size_before - other * shared) / determinant
        return float(first), float((other * size - towards * shared) / determinant)

    def weights(self, positions: Sequence[int]) -> tuple[tuple[float, float], ...]:
        """The weights of every evaluation if `positions` are computed; rounded as a recipe stores them."""
        weights = []
        for k in range(len(self.effects)):
            known = [one for one in positions if one < k][-2:][::-1]
            pair = self.fit(known[0], known[1] if len(known) > 1 else None, k) if known else (1.0, 0.0)
            weights.append(tuple(round(one, 5) for one in pair))
        return tuple(weights)

    def best(self, nodes: Sequence[int]) -> list[list[int]]:
        """For each number of computed evaluations the best choice among `nodes`, the first of them included.

        Dynamic programming: the state is the latest two computed evaluations, the cost of a step to the next one is the
        squared error that the skipped evaluations between them leave in the sample.
        """
        end, most = len(self.effects), len(nodes)
        states: dict[tuple[int | None, int], np.ndarray] = {(None, nodes[0]): _only(most, 1)}
        origin: dict[tuple[int | None, int], list[int | None]] = {}
        finished, last = np.full(most + 1, np.inf), [None] * (most + 1)
        for place, latest in enumerate(nodes):
            befores = [before for before, one in list(states) if one == latest]
            for before in befores:
                reached = states[before, latest]
                costs = self._costs(before, latest, min(end, latest + self.max_skip))
                for following in [*nodes[place + 1 :], end]:
                    if following - latest > self.max_skip and following != end:
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
        """The next computed evaluation -> the cost of extrapolating the ones before it."""
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
    """At most MAX_COSTS of the choices, evenly spread."""
    if len(choices) <= MAX_COSTS:
        return choices
    return [choices[round(i * (len(choices) - 1) / (MAX_COSTS - 1))] for i in range(MAX_COSTS)]
