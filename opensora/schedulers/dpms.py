"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095): few steps along the probability-flow ODE, exact in its linear part.

Time falls from 1 (noise) to 1/1000; the model predicts noise and gets time as a timestep 999..0. All samples share
their times, so alpha, sigma and lambda are lists of floats, one for each time between two steps.
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
FEW_STEPS = 10  # with fewer, the last steps of a multistep run have a lower order


class SchedulePoints(NamedTuple):
    """The noise schedule at the times of a run: time, alpha, sigma and lambda = log(alpha / sigma), [N + 1] each.

    Lambda is half the logarithm of the signal-to-noise ratio; the solver integrates over it.
    """

    time: list[float]
    alpha: list[float]
    sigma: list[float]
    lam: list[float]


Predictor = Callable[[Tensor, int], Tensor]  # (x, index into the schedule) -> clean latents


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
        """Raises ConfigError for an `edit`: a frame cannot start midway, as the solver combines earlier steps."""
        if edit is not None:
            raise ConfigError("dpm-solver cannot keep or edit frames; use rflow or iddpm, or no reference and mask")
        schedule = schedule_at(spaced_times(self.num_sampling_steps, self.skip_type))

        def predict_x0(x: Tensor, index: int) -> Tensor:
            timestep = torch.full((len(x),), schedule.time[index] * NUM_TIMESTEPS - 1, device=x.device)
            return (x - schedule.sigma[index] * denoise(x, timestep)) / schedule.alpha[index]

        solve = multistep if self.method == "multistep" else singlestep
        return solve(predict_x0, state, schedule, self.order)


def schedule_at(times: list[float]) -> SchedulePoints:
    """The linear schedule in continuous time: log alpha is interpolated linearly between its values at t = n / 1000."""
    log_alphas = np.interp(times, *_schedule())
    log_sigmas = np.log(-np.expm1(2 * log_alphas)) / 2
    lambdas = log_alphas - log_sigmas
    return SchedulePoints(times, np.exp(log_alphas).tolist(), np.exp(log_sigmas).tolist(), lambdas.tolist())


def times_at(lams: list[float]) -> list[float]:
    """The times of these values of lambda: the inverse of `schedule_at`."""
    times, log_alphas = _schedule()
    return np.interp(-np.log1p(np.exp(-2 * np.asarray(lams))) / 2, log_alphas[::-1], times[::-1]).tolist()


def spaced_times(num_steps: int, skip_type: str = "time_uniform") -> list[float]:
    """`num_steps` + 1 times from 1 to 1/1000, evenly spaced in time, in its square root, or in lambda."""
    first, last = 1.0, 1 / NUM_TIMESTEPS
    if skip_type == "logSNR":
        start, end = schedule_at([first, last]).lam
        return times_at(np.linspace(start, end, num_steps + 1).tolist())
    power = 2 if skip_type == "time_quadratic" else 1
    return (np.linspace(first ** (1 / power), last ** (1 / power), num_steps + 1) ** power).tolist()


def multistep(
    predict_x0: Predictor, state: SamplerState, schedule: SchedulePoints, order: int
) -> Iterator[SamplerState]:
    """The states after `state`: each step uses the latest predictions of x0, `order` at most.

    The order rises to `order` over the first steps; in a run of few steps it falls to 1 over the last (algorithm 2 of
    the paper; the third order is that of DPM-Solver, arXiv:2206.00927, for x0). `carry` has these predictions,
    "known0" the latest.
    """
    x, lam, num_steps = state.x, schedule.lam, len(schedule.time) - 1
    history = [state.carried(f"known{n}", x) for n in range(min(order, state.step))]
    for i in range(state.step, num_steps):
        history = [predict_x0(x, i), *history[: order - 1]]  # latest first
        step_order, h = min(len(history), num_steps - i if num_steps < FEW_STEPS else order), lam[i + 1] - lam[i]
        # Divided differences of the predictions (D1 and D2 of the paper), in units of this step.
        rates = [(history[n] - history[n + 1]) * (h / (lam[i - n] - lam[i - n - 1])) for n in range(step_order - 1)]
        if step_order == 3:
            curve = (rates[0] - rates[1]) * (h / (lam[i] - lam[i - 2]))
            rate = rates[0] + curve * ((lam[i] - lam[i - 1]) / h)
            x = _advance(schedule, x, i, i + 1, history[0], rate, curve)
        else:
            x = _advance(schedule, x, i, i + 1, history[0], *rates)
        yield SamplerState(i + 1, num_steps, x, history[0], {f"known{n}": x0 for n, x0 in enumerate(history)})


def singlestep(
    predict_x0: Predictor, state: SamplerState, schedule: SchedulePoints, order: int
) -> Iterator[SamplerState]:
    """The states after `state`: each step spans `order` intervals of `schedule`, with one evaluation each.

    The remaining intervals are a step of lower order; a run of third order always ends on a step of order 2 or 1
    (DPM-Solver, Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2 and "DPM-Solver-fast", for x0).
    """
    x, sizes = state.x, step_sizes(len(schedule.time) - 1, order)
    for step in range(state.step, len(sizes)):
        i = sum(sizes[:step])
        end, x0, rate, curve = i + sizes[step], predict_x0(x, i), None, None
        for index in range(i + 1, end):
            r = (schedule.lam[index] - schedule.lam[i]) / (schedule.lam[end] - schedule.lam[i])
            inner = _advance(schedule, x, i, index, x0, None if rate is None else rate * r, 0.0)
            rate = (predict_x0(inner, index) - x0) / r
            curve = 0.0 if sizes[step] == 3 else None
        x = _advance(schedule, x, i, end, x0, rate, curve)
        yield SamplerState(step + 1, len(sizes), x, x0)


def step_sizes(num_evaluations: int, order: int) -> list[int]:
    """The number of intervals in each step of `singlestep`."""
    sizes = [order] * (num_evaluations // order) + [num_evaluations % order] * (num_evaluations % order > 0)
    if order == 3 and num_evaluations % 3 == 0:
        sizes[-1:] = [2, 1]
    return sizes


def _advance(
    schedule: SchedulePoints, x: Tensor, i: int, j: int,
    x0: Tensor, rate: Tensor | None = None, curve: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    """Advances `x` from time i to j, where the prediction is `x0` at i; `rate` and `curve` are its differences up to j.

    The linear part of the ODE is exact. With `rate` and no `curve`, x0 of the middle of the step stands for all of it
    (DPM-Solver++, algorithms 1 and 2), a second-order method; with `curve`, even 0, the integral of x0 is exact.
    """
    h = schedule.lam[j] - schedule.lam[i]
    phi_1 = math.expm1(-h)
    x = schedule.sigma[j] / schedule.sigma[i] * x - schedule.alpha[j] * phi_1 * x0
    if rate is None:
        return x
    if curve is None:
        return x - schedule.alpha[j] * phi_1 / 2 * rate
    phi_2 = phi_1 / h + 1
    return x + schedule.alpha[j] * (phi_2 * rate - (phi_2 / h - 0.5) * curve)


def _schedule() -> tuple[np.ndarray, np.ndarray]:
    """The discrete times and log alpha at each, float64 [1000]."""
    log_alphas = (1 - linear_betas(NUM_TIMESTEPS)).cumprod(0).log() / 2
    return np.arange(1, NUM_TIMESTEPS + 1) / NUM_TIMESTEPS, log_alphas.numpy()
