"""The table of a step cache: which guidance branches every evaluation computes, and how the others are extrapolated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opensora.errors import ConfigError

Weights = tuple[tuple[float, float], ...]  # of the latest two computed values, for every evaluation


@dataclass(frozen=True)
class CacheTable:
    """What each evaluation of a run computes: "2" both guidance branches, "1" the conditional one, "0" neither.

    `text` and `guidance` weigh, for every evaluation, the latest and the second latest computed value of a signal that
    is not computed: the conditional prediction, and its difference to the unconditional one.
    """

    branches: str
    text: Weights
    guidance: Weights

    def __post_init__(self) -> None:
        lengths = {len(self.branches), len(self.text), len(self.guidance)}
        if len(lengths) != 1 or not self.branches or set(self.branches) - set("012") or self.branches[0] == "0":
            raise ConfigError("cache_table must begin with a computed evaluation and have one entry for each")
        if not all(len(pair) == 2 and all(map(math.isfinite, pair)) for pair in (*self.text, *self.guidance)):
            raise ConfigError("cache_table must have two finite numbers for each evaluation")

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> CacheTable:
        """The table of a configuration or recipe. Raises ConfigError."""
        try:
            pairs = ([tuple(map(float, pair)) for pair in entries[name]] for name in ("text", "guidance"))
            return cls(str(entries["halves"]), *map(tuple, pairs))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"cache_table is not a calibration table ({error!r}); use --cache auto") from error

    @classmethod
    def reuse(cls, branches: str) -> CacheTable:
        """A table that reuses the latest computed value unchanged."""
        latest = ((1.0, 0.0),) * len(branches)
        return cls(branches, latest, latest)

    @property
    def cost(self) -> int:
        """Branches computed in the whole run."""
        return sum(map(int, self.branches))

    def to_dict(self) -> dict[str, Any]:
        """The entries of a configuration or recipe."""
        pairs = {name: [list(pair) for pair in getattr(self, name)] for name in ("text", "guidance")}
        return {"halves": self.branches, **pairs}

    def computed(self, least: int, before: int) -> list[int]:
        """The evaluations before number `before` that compute at least `least` branches, latest first."""
        return [k for k in range(before - 1, -1, -1) if int(self.branches[k]) >= least]
