"""The rules of a step cache: how many guidance branches an evaluation computes.

A fixed table, found by calibration or from the ratios of MagCache (Ma et al. 2025, arXiv:2506.09045), and TeaCache (Liu
et al. 2024, arXiv:2411.19108), which decides by the input of the first block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from opensora.acceleration.step_cache.table import CacheTable
from opensora.errors import ConfigError
from opensora.models.layers.blocks import modulated, rows_of
from opensora.models.layers.transformer import StaticInputs
from opensora.schedulers.guidance import Conditioning

# Published for Open-Sora 1.2 at 30 steps. TeaCache: how the output changes with the input, highest power first.
# MagCache: squares of the ratios by which the residual's magnitude changes from each evaluation to the next.
TEA_POLYNOMIAL = (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.0484426240)
MAG_SQUARES = (
    0.93359, 0.96484, 0.99609, 1.0, 0.99609, 0.99609, 0.99219, 1.0, 1.0, 0.99609, 0.99219, 1.0, 0.99219, 0.99609,
    0.99219, 0.99609, 0.99609, 0.99609, 0.99219, 0.99219, 0.99219, 0.98828, 0.98828, 0.98438, 0.98438, 0.97656, 0.97656,
    0.96484, 0.96484,
)  # fmt: skip
TEA_THRESHOLD, MAG_THRESHOLD = 0.1, 0.06  # the published slow settings
MAG_FAST, MAG_MAX_SKIPPED = 0.12, 3  # evaluations skipped in a row from this threshold on; below it, one
MAG_WARM_UP = 0.2  # share of the run at its start that is always computed


class Rule(Protocol):
    """Decides what the evaluations of one run compute."""

    def __call__(self, number: int, x: Tensor, timestep: Tensor, masks: Mapping[str, Tensor]) -> int:
        """The guidance branches to compute in evaluation `number`: 2, 1 (conditional) or 0."""

    def weights(self, signal: str, number: int, computed: Sequence[int]) -> tuple[float, float]:
        """The weights of the values of `signal` in the latest evaluations that `computed` it, for `number`."""


class TableRule:
    """Computes what a table says."""

    def __init__(self, table: CacheTable) -> None:
        self.table = table

    def __call__(self, number: int, x: Tensor, timestep: Tensor, masks: Mapping[str, Tensor]) -> int:
        return int(self.table.branches[number])

    def weights(self, signal: str, number: int, computed: Sequence[int]) -> tuple[float, float]:
        """Those of the table if they were fitted to the same evaluations; else the latest value is reused."""
        fitted = self.table.computed(1 if signal == "text" else 2, number)[:2]
        return getattr(self.table, signal)[number] if list(computed) == fitted else (1.0, 0.0)


class TeaRule:
    """TeaCache: skips evaluations while the input of the first attention has changed little since the last one."""

    def __init__(self, model: Any, cond: Conditioning, num_evaluations: int, threshold: float) -> None:
        if not hasattr(model, "spatial_blocks"):
            raise ConfigError("cache 'tea' reads the first block of STDiT3; use --cache auto with other models")
        self.model, self.cond, self.last, self.threshold = model, cond, num_evaluations - 1, threshold
        self.static: StaticInputs | None = None
        self.before: Tensor | None = None
        self.change = 0.0

    def __call__(self, number: int, x: Tensor, timestep: Tensor, masks: Mapping[str, Tensor]) -> int:
        if self.static is None:
            self.static = self.model.static_inputs(x.shape, **self.cond)
        now = first_input(self.model, x, timestep, self.static, masks.get("x_mask"))
        before, self.before = self.before, now
        if before is not None and 0 < number < self.last:
            change = ((now - before).abs().mean() / before.abs().mean()).item()
            self.change += polynomial(TEA_POLYNOMIAL, change)
            if self.change < self.threshold:
                return 0
        self.change = 0.0
        return 2

    def weights(self, signal: str, number: int, computed: Sequence[int]) -> tuple[float, float]:
        return (1.0, 0.0)


def first_input(model: Any, x: Tensor, timestep: Tensor, static: StaticInputs, x_mask: Tensor | None = None) -> Tensor:
    """The input of the first attention of an STDiT3: its tokens [B, T, S, C], normalised and modulated."""
    block, modulation = model.spatial_blocks[0], model.modulation(timestep, static.size, x_mask)
    shift, scale = rows_of(block.scale_shift_table + modulation.blocks)[:2]
    return modulated(model.x_embedder(x.to(model.dtype)) + static.positions, shift, scale)


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """The value at x, highest power first (Horner)."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def mag_table(
    num_evaluations: int, threshold: float = MAG_THRESHOLD, ratios: Sequence[float] | None = None, branches: int = 2
) -> CacheTable:
    """MagCache's table for a run: evaluations are skipped while the ratios predict a small error.

    `ratios` are those of the prediction's magnitude from each evaluation to the next, for any number of evaluations; by
    default those published for Open-Sora 1.2.
    """
    ratios = [math.sqrt(one) for one in MAG_SQUARES] if ratios is None else ratios
    per_step, max_skipped = len(ratios) / max(num_evaluations - 1, 1), MAG_MAX_SKIPPED if threshold >= MAG_FAST else 1
    computed, product, error, skipped = [str(branches)], 1.0, 0.0, 0
    for k in range(1, num_evaluations):
        ratio = ratios[min(int((k - 0.5) * per_step), len(ratios) - 1)]
        product *= ratio**per_step if per_step < 1 else ratio
        error += abs(1 - product)
        skips = k >= MAG_WARM_UP * num_evaluations and error <= threshold and skipped < max_skipped
        computed.append("0" if skips else str(branches))
        if skips:
            skipped += 1
        else:
            product, error, skipped = 1.0, 0.0, 0
    return CacheTable.reuse("".join(computed))
