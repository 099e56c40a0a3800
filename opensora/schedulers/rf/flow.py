"""Rectified flow (Liu et al. 2022, arXiv:2209.03003): straight lines between noise and data, as pure functions.

Axes: latents [B, C, T, H, W], times [B] in 0..1 (1 noise, 0 data), frame masks [B, T]. A velocity points from noise to
data: data - noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from opensora.schedulers.guidance import Denoiser

Progress = bool | Callable[[int, int], None]
NoiseSource = torch.Generator | Sequence[torch.Generator] | Callable[[], torch.Tensor]


def add_noise(x: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The point at `time` [B] on the line from data `x` to `noise`: (1 - time) x + time noise."""
    time = _per_sample(time)
    return (1 - time) * x + time * noise


@torch.no_grad()
def sample(
    velocity: Denoiser,
    noise: torch.Tensor,
    times: torch.Tensor,
    edit: torch.Tensor | None = None,
    source: NoiseSource | None = None,
    progress: Progress = False,
) -> torch.Tensor:
    """Clean latents [B, C, T, H, W], float32: Euler's method from `times[0]` to `times[-1]`.

    `velocity(x, time)` is called with time [B]. `times` is [N + 1] or [N + 1, B] and falls.

    `edit` [B, T] holds frames of `noise` that are in truth clean: 0 keeps a frame, 1 generates it, a value between
    leaves it alone until time has fallen to that value, then noises it to that time and generates from there. The model
    is told which frames are active: `velocity(x, time, x_mask=active)`, bool [B, T]. Each step draws one tensor of the
    latents' shape from `source`: a generator per sample (then results do not depend on the batch), one generator, or a
    callable. Without `edit`, or when it is 1 everywhere, no mask is passed and nothing is drawn, which is exact.

    `progress` shows a bar with the time left, or is called with (steps done, steps).
    Raises ValueError when `edit` needs random numbers and `source` is None.
    """
    x = noise.float()
    times = times.to(x.device)
    if edit is not None and bool((edit >= 1).all()):
        edit = None
    if edit is not None:
        if source is None:
            raise ValueError("frames are kept or edited, which draws noise; pass one generator per sample as source")
        edit = edit.to(x)
        clean = edit < 1

    for step in _steps(len(times) - 1, progress):
        time, following = (times[i].expand(len(x)) for i in (step, step + 1))
        stride = _per_sample(time - following)
        if edit is None:
            x = x + velocity(x, time) * stride
            continue
        active = edit >= time[:, None]
        x = torch.where(_per_frame(active & clean), add_noise(x, _draw(source, x), time), x)
        clean = clean & ~active
        x = torch.where(_per_frame(active), x + velocity(x, time, x_mask=active) * stride, x)
    return x


def training_loss(
    model: Denoiser,
    x_start: torch.Tensor,
    cond: Mapping[str, Any],
    noise: torch.Tensor,
    time: torch.Tensor,
    mask: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    num_timesteps: int = 1000,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity, per sample: float32 [B].

    `model(x, timestep, **cond)` gets timesteps 0..num_timesteps; only its first C channels count. Frames where `mask`
    [B, T] is False are fed clean, told to the model as `x_mask`, and left out of the mean (a sample without any True
    frame has loss 0). `weights` [num_timesteps] multiplies each loss by the entry of its nearest whole timestep.
    """
    x_time = add_noise(x_start, noise, time)
    frames = {}
    if mask is not None:
        mask = mask.bool()
        x_time = torch.where(_per_frame(mask), x_time, x_start)
        frames["x_mask"] = mask
    predicted = model(x_time, time * num_timesteps, **cond, **frames)[:, : x_start.shape[1]]
    error = (predicted.float() - (x_start.float() - noise.float())).square().mean(dim=(1, 3, 4))  # [B, T]
    loss = error.mean(dim=1) if mask is None else (error * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    if weights is not None:
        nearest = (time * num_timesteps).round().long().clamp(max=len(weights) - 1)
        loss = loss * weights[nearest]
    return loss


def _per_sample(value: torch.Tensor) -> torch.Tensor:
    return value[:, None, None, None, None]  # [B] -> [B, 1, 1, 1, 1]


def _per_frame(value: torch.Tensor) -> torch.Tensor:
    return value[:, None, :, None, None]  # [B, T] -> [B, 1, T, 1, 1]


def _draw(source: NoiseSource, x: torch.Tensor) -> torch.Tensor:
    """Standard-normal numbers of the shape of `x`, drawn where the generator lives and moved to `x`."""
    if isinstance(source, torch.Generator):
        drawn = torch.randn(x.shape, generator=source, device=source.device)
    elif callable(source):
        drawn = source()
    else:
        if len(source) != len(x):
            raise ValueError(f"{len(source)} generators for a batch of {len(x)}; pass one per sample")
        drawn = torch.stack([torch.randn(x.shape[1:], generator=one, device=one.device) for one in source])
    return drawn.to(x)


def _steps(total: int, progress: Progress) -> Iterator[int]:
    if progress is True:
        from tqdm import tqdm

        yield from tqdm(range(total), desc="sampling", unit="step")
        return
    for step in range(total):
        yield step
        if progress:
            progress(step + 1, total)
