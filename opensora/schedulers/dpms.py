"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095): few steps along the probability-flow ODE, exact in its linear part.

Time falls from 1 (noise) to 1/1000; the model, which predicts noise, gets it as a timestep 999..0. All samples share
their times, so everything that depends on time alone is a list of floats, one for each point between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opensora.errors import ConfigError
from opensora.schedulers import common
from opensora.schedulers.common import NoiseSource, Number, SamplerState
from opensora.schedulers.diffusion import linear_betas
from opensora.schedulers.guidance import Denoiser
from opensora.schedulers.sampler import Sampler, Size

NUM_TIMESTEPS = 1000
SKIP_TYPES, METHODS = ("time_uniform", "logSNR", "time_quadratic"), ("multistep", "singlestep")
FEW_STEPS = 10  # with fewer, the last steps of a multistep run fall in order


class SchedulePoints(NamedTuple):
    """Points that a solver visits: time, scale of signal and of noise, and lambda = log(alpha / sigma), [N + 1] each.

    Lambda is half the logarithm of the signal-to-noise ratio. The solver steps in it.
    """

    time: list[float]
    alpha: list[float]
    sigma: list[float]
    lam: list[float]


Predictor = Callable[[Tensor, int], Tensor]  # (x, number of a point) -> clean latents


@dataclass(frozen=True)
class DPM_SOLVER(Sampler):
    """The DPM-Solver++ sampler; its fields are the keys of a configuration.

    `order` is 1 to 3, `skip_type` the spacing of the steps. A step of `method` "multistep" uses the predictions of
    earlier steps, one of "singlestep" several evaluations of its own; both evaluate the model `num_sampling_steps`
    times. IDDPM trains the models. Raises ConfigError for invalid settings.
    """

    num_sampling_steps: int = 20
    cfg_scale: float = 4.0
    order: int = 2
    skip_type: str = "time_uniform"
    method: str = "multistep"

    draws_noise: ClassVar[bool] = False
    supports_edit: ClassVar[bool] = False

    def __post_init__(self) -> None:
        common.check(self, ("num_sampling_steps",), skip_type=SKIP_TYPES, method=METHODS)
        if self.order not in (1, 2, 3):
            raise ConfigError(f"scheduler: order is {self.order}; it must be 1, 2 or 3")

    @property
    def num_steps(self) -> int:
        count = self.num_sampling_steps
        return count if self.method == "multistep" else len(step_sizes(count, self.order))

    def timesteps(self, height: Number = None, width: Number = None, num_frames: Number = None) -> list[float]:
        times = spaced_times(self.num_sampling_steps, self.skip_type)
        sizes = [1] * self.num_steps if self.method == "multistep" else step_sizes(self.num_sampling_steps, self.order)
        return [times[sum(sizes[:step])] * NUM_TIMESTEPS - 1 for step in range(self.num_steps)]

    @property
    def num_evaluations(self) -> int:
        return self.num_sampling_steps

    def _solve(
        self, denoise: Denoiser, state: SamplerState, size: Size, edit: Tensor | None, source: NoiseSource | None
    ) -> Iterator[SamplerState]:
        """Raises ConfigError for an `edit`: the method combines several steps, which a frame cannot join in between."""
        if edit is not None:
            raise ConfigError("dpm-solver cannot keep or edit frames; use rflow or iddpm, or no reference and mask")
        path = path_at(spaced_times(self.num_sampling_steps, self.skip_type))

        def data(x: Tensor, point: int) -> Tensor:
            timestep = torch.full((len(x),), path.time[point] * NUM_TIMESTEPS - 1, device=x.device)
            return (x - path.sigma[point] * denoise(x, timestep)) / path.alpha[point]

        solve = multistep if self.method == "multistep" else singlestep
        return solve(data, state, path, self.order)


def path_at(times: list[float]) -> SchedulePoints:
    """The linear schedule in continuous time: log alpha runs straight between its values at t = n / 1000."""
    log_alphas = np.interp(times, *_schedule())
    log_sigmas = np.log(-np.expm1(2 * log_alphas)) / 2
    lambdas = log_alphas - log_sigmas
    return SchedulePoints(times, np.exp(log_alphas).tolist(), np.exp(log_sigmas).tolist(), lambdas.tolist())


def times_at(lams: list[float]) -> list[float]:
    """The times at which lambda has these values."""
    times, log_alphas = _schedule()
    return np.interp(-np.log1p(np.exp(-2 * np.asarray(lams))) / 2, log_alphas[::-1], times[::-1]).tolist()


def spaced_times(num_steps: int, skip_type: str = "time_uniform") -> list[float]:
    """The `num_steps` + 1 times of that many steps, from 1 to 1/1000, even in time, in its root, or in lambda."""
    first, last = 1.0, 1 / NUM_TIMESTEPS
    if skip_type == "logSNR":
        start, end = path_at([first, last]).lam
        return times_at(np.linspace(start, end, num_steps + 1).tolist())
    power = 2 if skip_type == "time_quadratic" else 1
    return (np.linspace(first ** (1 / power), last ** (1 / power), num_steps + 1) ** power).tolist()


def multistep(data: Predictor, state: SamplerState, path: SchedulePoints, order: int) -> Iterator[SamplerState]:
    """The states after `state`: each step uses the latest predictions of clean latents, `order` at most.

    The order rises to `order` over the first steps; in a run of few steps it falls to 1 over the last (algorithm 2 of
    the paper, and the third order of DPM-Solver's, arXiv:2206.00927, in its terms). The carry has these predictions,
    "known0" the latest.
    """
    x, lam, num_steps = state.x, path.lam, len(path.time) - 1
    known = [state.carried(f"known{n}", x) for n in range(min(order, state.step))]
    for i in range(state.step, num_steps):
        known = [data(x, i), *known[: order - 1]]  # latest first
        used, h = min(len(known), num_steps - i if num_steps < FEW_STEPS else order), lam[i + 1] - lam[i]
        # Divided differences of the predictions, in units of this step.
        rates = [(known[n] - known[n + 1]) * (h / (lam[i - n] - lam[i - n - 1])) for n in range(used - 1)]
        if used == 3:
            curve = (rates[0] - rates[1]) * (h / (lam[i] - lam[i - 2]))
            rate = rates[0] + curve * ((lam[i] - lam[i - 1]) / h)
            x = _advance(path, x, i, i + 1, known[0], rate, curve)
        else:
            x = _advance(path, x, i, i + 1, known[0], *rates)
        yield SamplerState(i + 1, num_steps, x, known[0], {f"known{n}": one for n, one in enumerate(known)})


def singlestep(data: Predictor, state: SamplerState, path: SchedulePoints, order: int) -> Iterator[SamplerState]:
    """The states after `state`: each step spans `order` intervals of `path`, with an evaluation in each.

    The remaining intervals are a step of lower order; a run of third order always ends on a step of order 2 or 1
    (DPM-Solver, Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2 and "DPM-Solver-fast", for clean latents).
    """
    x, sizes = state.x, step_sizes(len(path.time) - 1, order)
    for step in range(state.step, len(sizes)):
        i = sum(sizes[:step])
        end, first, rate, curve = i + sizes[step], data(x, i), None, None
        for point in range(i + 1, end):
            share = (path.lam[point] - path.lam[i]) / (path.lam[end] - path.lam[i])
            inner = _advance(path, x, i, point, first, None if rate is None else rate * share, 0.0)
            rate = (data(inner, point) - first) / share
            curve = 0.0 if sizes[step] == 3 else None
        x = _advance(path, x, i, end, first, rate, curve)
        yield SamplerState(step + 1, len(sizes), x, first)


def step_sizes(num_evaluations: int, order: int) -> list[int]:
    """The number of intervals in each step of `singlestep`."""
    sizes = [order] * (num_evaluations // order) + [num_evaluations % order] * (num_evaluations % order > 0)
    if order == 3 and num_evaluations % 3 == 0:
        sizes[-1:] = [2, 1]
    return sizes


def _advance(
    path: SchedulePoints, x: Tensor, i: int, j: int,
    data: Tensor, rate: Tensor | None = None, curve: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    """`x` at point j for clean latents that are `data` at point i and change by `rate`, and `curve`, up to j.

    The linear part of the ODE is exact. With `rate` and no `curve` the clean latents of the middle stand for all of
    the step (DPM-Solver++, algorithms 1 and 2), a second-order method; with `curve`, even 0, their integral is exact.
    """
    h = path.lam[j] - path.lam[i]
    phi_1 = math.expm1(-h)
    x = path.sigma[j] / path.sigma[i] * x - path.alpha[j] * phi_1 * data
    if rate is None:
        return x
    if curve is None:
        return x - path.alpha[j] * phi_1 / 2 * rate
    phi_2 = phi_1 / h + 1
    return x + path.alpha[j] * (phi_2 * rate - (phi_2 / h - 0.5) * curve)


def _schedule() -> tuple[np.ndarray, np.ndarray]:
    """The discrete times and log alpha at each, float64 [1000]."""
    log_alphas = (1 - linear_betas(NUM_TIMESTEPS)).cumprod(0).log() / 2
    return np.arange(1, NUM_TIMESTEPS + 1) / NUM_TIMESTEPS, log_alphas.numpy()
