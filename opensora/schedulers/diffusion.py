"""Gaussian diffusion in discrete steps: the forward process, its posterior, and the variational bound.

Sources: DDPM (Ho et al. 2020, arXiv:2006.11239) and IDDPM (Nichol and Dhariwal 2021, arXiv:2102.09672).

Axes: latents x [B, C, T, H, W]; steps t, int64 [B], from 0 (almost data) to N - 1 (noise); tables [N]. A process may
use a subset of the timesteps it was defined on: `timestep_map` maps its steps to the timesteps that the model gets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opensora.errors import ConfigError
from opensora.schedulers.common import per_sample, upload

MAX_BETA = 0.999
BINS = 255  # intervals between the 256 values of 8-bit data scaled to -1..1


def linear_betas(num_timesteps: int = 1000) -> Tensor:
    """Variances from 1e-4 to 2e-2, float64 [num_timesteps] (DDPM, section 4), scaled if there are not 1000."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 2e-2, num_timesteps, dtype=torch.float64).clamp(max=MAX_BETA)


def cosine_betas(num_timesteps: int = 1000) -> Tensor:
    """Variances whose alpha-bar falls as a squared cosine, float64 [num_timesteps] (IDDPM, equation 17)."""
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alphas_cumprod = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=MAX_BETA)


NOISE_SCHEDULES: dict[str, Callable[[int], Tensor]] = {"linear": linear_betas, "squaredcos_cap_v2": cosine_betas}


def space_timesteps(num_timesteps: int, sections: str | Sequence[int]) -> list[int]:
    """The timesteps to keep of 0..num_timesteps - 1, ascending.

    `sections` "ddimN" keeps N of them at an integer stride (DDIM, Song et al. 2020, arXiv:2010.02502); "10,15,20" or
    [10, 15, 20] cuts the range into equal sections and keeps that many of each, evenly spaced, ends included; "" keeps
    all. Raises ConfigError when there are not that many.
    """
    if isinstance(sections, str) and sections.startswith("ddim") and sections[4:].isdigit():
        wanted = int(sections[4:])
        for stride in range(1, num_timesteps + 1):
            if len(strided := range(0, num_timesteps, stride)) == wanted:
                return list(strided)
        raise ConfigError(f"no integer stride takes {wanted} of {num_timesteps} timesteps; choose another number")
    try:
        counts = [int(count) for count in (sections.split(",") if isinstance(sections, str) else sections)]
    except ValueError:
        raise ConfigError(f"timestep_respacing '{sections}' is not a number, '10,15,20' or 'ddim20'") from None
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = num_timesteps // len(counts) + (section < num_timesteps % len(counts))
        if not 1 <= count <= size:
            raise ConfigError(f"timestep_respacing '{sections}' takes {count} of {size} timesteps; take 1 to {size}")
        gap, at = (size - 1) / max(count - 1, 1), 0.0
        for _ in range(count):  # summed, not multiplied: a tie then rounds as in the recorded selections
            kept.append(start + round(at))
            at += gap
        start += size
    return kept


class Diffusion:
    """The process on a subset `timesteps` of those of `betas` [num_timesteps], with the tables of its coefficients.

    The beta of a kept step is 1 - alpha_bar / alpha_bar of the previous kept step. By default all tables are float64,
    as in Open-Sora 1.0, and rounded when a value is looked up. `dtype=torch.float32` rounds these betas and computes
    the other tables from them in float32, as Open-Sora 1.1 and 1.2 did: 1 - alpha_bar then has rounding errors of up
    to 2e-4 near t = 0, as the recorded samples do.
    """

    def __init__(self, betas: Tensor, timesteps: Sequence[int], dtype: torch.dtype = torch.float64) -> None:
        self.timestep_map = torch.tensor(timesteps)
        kept = (1 - betas.double()).cumprod(0)[self.timestep_map]
        one, zero = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
        self.betas = (1 - kept / torch.cat([one.double(), kept[:-1]])).to(dtype)
        self.log_betas = self.betas.log()
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        self.alphas_cumprod_prev = torch.cat([one, self.alphas_cumprod[:-1]])
        self.alphas_cumprod_next = torch.cat([self.alphas_cumprod[1:], zero])
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()
        self.log_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).log()
        self.sqrt_recip_alphas_cumprod = (1 / self.alphas_cumprod).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / self.alphas_cumprod - 1).sqrt()
        # q(x_{t-1} | x_t, x_0), DDPM equations 6 and 7. Its variance is 0 at t = 0: the logarithm repeats t = 1.
        ratio = 1 / (1 - self.alphas_cumprod)
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) * ratio
        lowest = self.posterior_variance[1:2] if len(timesteps) > 1 else self.betas
        self.posterior_log_variance_clipped = torch.cat([lowest, self.posterior_variance[1:]]).log()
        self.posterior_mean_coef1 = self.betas * self.alphas_cumprod_prev.sqrt() * ratio
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * (1 - self.betas).sqrt() * ratio

    def __len__(self) -> int:
        return len(self.betas)

    def to(self, like: Tensor) -> Diffusion:
        """A copy whose tables are on the device and in the dtype of `like`."""
        moved = copy.copy(self)
        for name, table in vars(self).items():
            setattr(moved, name, upload(table.to(like.dtype) if table.is_floating_point() else table, like))
        return moved

    def timestep(self, t: Tensor, like: Tensor) -> Tensor:
        """The timesteps that the model gets at steps `t` [B], float32, on the device of `like`."""
        return self.timestep_map[t.to(self.timestep_map.device)].to(like.device, torch.float32)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """`x_start` noised to step t with standard-normal `noise` (DDPM, equation 4)."""
        signal = look_up(self.sqrt_alphas_cumprod, t, x_start)
        return signal * x_start + look_up(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise

    def q_posterior(self, x_start: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of q(x_{t-1} | x_t, x_0), and its clipped log variance [B, 1, 1, 1, 1]."""
        mean = look_up(self.posterior_mean_coef1, t, x) * x_start + look_up(self.posterior_mean_coef2, t, x) * x
        return mean, look_up(self.posterior_log_variance_clipped, t, x)

    def x_start_from_eps(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The clean latents, from noisy `x` and its noise `eps`."""
        scale = look_up(self.sqrt_recip_alphas_cumprod, t, x)
        return scale * x - look_up(self.sqrt_recipm1_alphas_cumprod, t, x) * eps

    def eps_from_x_start(self, x: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """The noise in `x`, from the clean latents `x_start`."""
        scale = look_up(self.sqrt_recip_alphas_cumprod, t, x)
        return (scale * x - x_start) / look_up(self.sqrt_recipm1_alphas_cumprod, t, x)

    def learned_log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """`v` interpolates between the posterior's log variance (-1) and log beta (1): IDDPM, equation 15."""
        high, low = (look_up(table, t, v) for table in (self.log_betas, self.posterior_log_variance_clipped))
        return low + (v + 1) / 2 * (high - low)

    def bound(self, x_start: Tensor, x: Tensor, t: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """The term of the variational bound at t, in bits per element (IDDPM, equation 4).

        `mean` and `log_variance` are the predicted ones of x_{t-1}. The term is the KL divergence from the posterior,
        at t = 0 the negative log likelihood of the data.
        """
        true_mean, true_log_variance = self.q_posterior(x_start, x, t)
        distance = (true_mean - mean).square() * torch.exp(-log_variance)
        ratio = true_log_variance - log_variance
        divergence = 0.5 * (torch.exp(ratio) - ratio - 1 + distance)
        likelihood = discretised_log_likelihood(x_start, mean, log_variance / 2)
        return torch.where(per_sample(t == 0).to(x.device), -likelihood, divergence) / math.log(2)


def look_up(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """The entries of a table [N] at `t` [B] as [B, 1, 1, 1, 1], rounded to the dtype of `like`."""
    return per_sample(table[t.to(table.device)].to(like.dtype)).to(like.device)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of the 8-bit value around each element of `x` in -1..1 (DDPM, equation 13), in nats.

    The lowest and the highest value include their tails. The normal CDF is approximated by a hyperbolic tangent (Page
    1977), as for the recorded losses.
    """

    def cdf(value: Tensor) -> Tensor:
        z = (value - mean) * torch.exp(-log_scale)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    above, below = cdf(x + 1 / BINS), cdf(x - 1 / BINS)
    below = torch.where(x < -0.999, 0.0, below)
    return (torch.where(x > 0.999, 1.0, above) - below).clamp(min=1e-12).log()
