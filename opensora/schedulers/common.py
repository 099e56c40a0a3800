"""Shared by the samplers: the state after a step, checks of settings, broadcasting, random numbers, frame masks.

Axes: latents [B, C, T, H, W], frame masks and values [B, T].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opensora.errors import ConfigError, did_you_mean

Number = float | Tensor | None  # one value, or one per sample [B]; None if no timestep transform uses it
NoiseSource = Sequence[torch.Generator] | Callable[[], Tensor]  # one generator per sample, or a function that draws


@dataclass(frozen=True)
class SamplerState:
    """The state of sampling after a step. A sampler resumes from it bit for bit, with the same model and conditioning.

    step: steps done, of num_steps
    x: the noisy latents [B, C, T, H, W], float32
    x0: the clean latents that the step predicts; `x` itself before any step has run
    carry: other tensors that the solver needs to resume, such as earlier predictions (its history), by name
    """

    step: int
    num_steps: int
    x: Tensor
    x0: Tensor
    carry: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, like: Tensor) -> SamplerState:
        """The state on the device and in the floating-point type of `like`."""
        carry = {n: t.to(like if t.is_floating_point() else like.device) for n, t in self.carry.items()}
        return SamplerState(self.step, self.num_steps, self.x.to(like), self.x0.to(like), carry)

    def carried(self, name: str, initial: Tensor) -> Tensor:
        """`carry[name]`, or `initial` before the first step. Raises ConfigError if it is missing."""
        if self.step and name not in self.carry:
            raise ConfigError(f"the draft lacks the sampler's tensor '{name}'; create the draft again")
        return self.carry[name] if self.step else initial


def check(settings: Any, positive: Sequence[str], **choices: Collection[str]) -> None:
    """Raises ConfigError when a `positive` field of `settings` is below 1, or another is not among its `choices`."""
    for name in positive:
        if (value := getattr(settings, name)) is not None and value < 1:
            raise ConfigError(f"scheduler: {name} is {value}; it must be at least 1")
    for name, known in choices.items():
        if (value := getattr(settings, name)) not in known:
            remedy = f"choose {' or '.join(known)}{did_you_mean(value, known)}"
            raise ConfigError(f"scheduler: {name} '{value}' is not known; {remedy}")


def per_sample(value: Tensor) -> Tensor:
    return value[:, None, None, None, None]  # [B] -> [B, 1, 1, 1, 1]


def per_frame(value: Tensor) -> Tensor:
    return value[:, None, :, None, None]  # [B, T] -> [B, 1, T, 1, 1]


def frame_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean [B] of `values` [B, T] over the frames where `mask` [B, T] is True; 0 for a sample without any."""
    return values.mean(dim=1) if mask is None else (values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def upload(values: Tensor, like: Tensor) -> Tensor:
    """`values` on the device of `like`. The copy is asynchronous if the memory can be pinned."""
    if values.device == like.device:
        return values
    try:
        return values.pin_memory().to(like.device, non_blocking=True)
    except (RuntimeError, NotImplementedError):
        return values.to(like.device)


def draw(source: NoiseSource | None, x: Tensor, rows: Sequence[bool] | None = None) -> Tensor:
    """Standard-normal noise like `x`, drawn on the device of the generators.

    A sample whose entry of `rows` [B] is False gets zeros, and its generator is not advanced. Raises ValueError without
    a source, or with another number of generators than samples.
    """
    if source is None:
        raise ValueError("this run of the sampler draws noise; pass one generator per sample as source")
    if callable(source):
        return upload(source(), x).to(x.dtype)
    if len(source) != len(x):
        raise ValueError(f"{len(source)} generators for a batch of {len(x)}; pass one per sample")
    noise = torch.zeros_like(x)
    for row, generator in enumerate(source):
        if rows is None or rows[row]:
            noise[row] = upload(torch.randn(x.shape[1:], generator=generator, device=generator.device), x)
    return noise
