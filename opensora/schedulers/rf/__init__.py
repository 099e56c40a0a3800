"""Rectified flow: `RFLOW` holds the settings and calls the pure functions of `flow` and `times`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from opensora.errors import ConfigError, did_you_mean
from opensora.schedulers.guidance import Denoiser, guided
from opensora.schedulers.rf import flow
from opensora.schedulers.rf.flow import NoiseSource, Progress, add_noise
from opensora.schedulers.rf.times import (
    Number,
    logit_normal_times,
    sampling_times,
    timestep_transform,
    uniform_times,
)

__all__ = ["RFLOW", "add_noise", "sampling_times", "timestep_transform"]

SAMPLE_METHODS = ("uniform", "logit-normal")


@dataclass(frozen=True)
class RFLOW:
    """Settings of rectified flow (Liu et al. 2022, arXiv:2209.03003), under the names that configuration files use.

    Times are 0 (data) to 1 (noise) everywhere except at the model's door, where they become timesteps
    0..`num_timesteps`. `use_timestep_transform` shifts times by video size, when training by `transform_scale` in
    addition; `sample_method="logit-normal"` draws training times as sigmoid(Normal(`loc`, `scale`)). Both are from
    Esser et al. 2024 (Stable Diffusion 3, arXiv:2403.03206).

    Raises ConfigError for settings that make no sense.
    """

    num_sampling_steps: int = 10
    num_timesteps: int = 1000
    cfg_scale: float = 4.0
    use_discrete_timesteps: bool = False
    use_timestep_transform: bool = False
    sample_method: str = "uniform"
    loc: float = 0.0
    scale: float = 1.0
    transform_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_sampling_steps", "num_timesteps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"scheduler: {name} is {getattr(self, name)}; it must be at least 1")
        if self.sample_method not in SAMPLE_METHODS:
            hint = did_you_mean(self.sample_method, SAMPLE_METHODS) or f"; choose one of {', '.join(SAMPLE_METHODS)}"
            raise ConfigError(f"scheduler: sample_method '{self.sample_method}' is not known{hint}")
        if self.sample_method == "logit-normal" and self.use_discrete_timesteps:
            raise ConfigError(
                "scheduler: sample_method 'logit-normal' draws continuous times; "
                "set use_discrete_timesteps=False or sample_method='uniform'"
            )

    def sample(
        self,
        model: Denoiser,
        noise: torch.Tensor,
        cond: Mapping[str, Any],
        null: Mapping[str, Any] | None = None,
        *,
        height: Number | None = None,
        width: Number | None = None,
        num_frames: Number | None = None,
        guidance_scale: float | None = None,
        edit: torch.Tensor | None = None,
        source: NoiseSource | None = None,
        progress: Progress = False,
    ) -> torch.Tensor:
        """Clean latents [B, C, T, H, W], float32, from `noise` of that shape.

        `model(x, timestep, **cond)` gets timestep [B]; `cond` and `null` are described at `guidance.guided`; `edit`,
        `source` and `progress` at `flow.sample`. `height`, `width` (pixels) and `num_frames` (pixel frames), one number
        or [B], feed the timestep transform only. `guidance_scale` overrides `cfg_scale`.
        """
        times = sampling_times(self.num_sampling_steps, self.num_timesteps, self.use_discrete_timesteps)
        if self.use_timestep_transform:
            times = self._transform(times[:, None], height, width, num_frames)  # [N + 1, B]
        denoise = guided(model, cond, null, self.cfg_scale if guidance_scale is None else guidance_scale)

        def velocity(x: torch.Tensor, time: torch.Tensor, **frames: torch.Tensor) -> torch.Tensor:
            return denoise(x, time * self.num_timesteps, **frames)

        return flow.sample(velocity, noise, times, edit, source, progress)

    def training_times(
        self,
        draw: torch.Tensor,
        height: Number | None = None,
        width: Number | None = None,
        num_frames: Number | None = None,
    ) -> torch.Tensor:
        """Times [B] for random numbers `draw` [B]: standard normal for "logit-normal", otherwise uniform in [0, 1)."""
        if self.sample_method == "logit-normal":
            times = logit_normal_times(draw, self.loc, self.scale)
        else:
            times = uniform_times(draw, self.num_timesteps, self.use_discrete_timesteps)
        if self.use_timestep_transform:
            times = self._transform(times, height, width, num_frames, self.transform_scale)
        return times

    def training_loss(
        self,
        model: Denoiser,
        x_start: torch.Tensor,
        cond: Mapping[str, Any],
        *,
        height: Number | None = None,
        width: Number | None = None,
        num_frames: Number | None = None,
        noise: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Loss per sample, float32 [B]; see `flow.training_loss`.

        `noise` and `time` ([B] in 0..1, used as it is) are drawn when absent: from `generator`, which lives on any
        device, or from the default generator of the device of `x_start`.
        """
        device = x_start.device if generator is None else generator.device
        if time is None:
            draw = torch.randn if self.sample_method == "logit-normal" else torch.rand
            drawn = draw(len(x_start), generator=generator, device=device).to(x_start.device)
            time = self.training_times(drawn, height, width, num_frames)
        if noise is None:
            noise = torch.randn(x_start.shape, generator=generator, device=device).to(x_start.device)
        return flow.training_loss(model, x_start, cond, noise, time, mask, weights, self.num_timesteps)

    def _transform(
        self,
        times: torch.Tensor,
        height: Number | None,
        width: Number | None,
        num_frames: Number | None,
        scale: float = 1.0,
    ) -> torch.Tensor:
        if height is None or width is None or num_frames is None:
            raise ValueError("use_timestep_transform needs height, width and num_frames of the video")
        return timestep_transform(times, height, width, num_frames, scale)
