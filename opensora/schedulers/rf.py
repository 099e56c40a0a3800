"""Rectified flow (Liu et al. 2022, arXiv:2209.03003): straight lines between noise and data.

Axes: latents [B, C, T, H, W], times [B] in 0..1 (1 noise, 0 data), frame masks [B, T]. A velocity points from noise to
data: data - noise. At the model's door, and only there, times become timesteps 0..num_timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from opensora.errors import ConfigError
from opensora.schedulers import common
from opensora.schedulers.common import NoiseSource, Number, Pause, Progress, per_frame, per_sample
from opensora.schedulers.guidance import Denoiser, guided

CHUNK, CHUNK_LATENTS = 17, 5  # pixel frames that the video autoencoder takes at once, and what they become


@dataclass(frozen=True)
class RFLOW:
    """Settings of rectified flow under the names that configuration files use, and what is done with them.

    `use_timestep_transform` shifts times by video size, when training by `transform_scale` in addition;
    `sample_method="logit-normal"` draws training times as sigmoid(Normal(`loc`, `scale`)). Both are from Esser et al.
    2024 (Stable Diffusion 3, arXiv:2403.03206). `height` and `width` (pixels) and `num_frames` (pixel frames) of a
    video feed the transform only. Raises ConfigError for settings that make no sense.
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

    draws_noise: ClassVar[bool] = False  # but for edited frames
    takes_edit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        common.check(self, ("num_sampling_steps", "num_timesteps"), sample_method=("uniform", "logit-normal"))
        if self.sample_method == "logit-normal" and self.use_discrete_timesteps:
            remedy = "set use_discrete_timesteps=False or sample_method='uniform'"
            raise ConfigError(f"scheduler: sample_method 'logit-normal' draws continuous times; {remedy}")

    @property
    def num_steps(self) -> int:
        """Steps that `progress` counts, and that `pause` can stop between."""
        return self.num_sampling_steps

    def sample(
        self, model: Denoiser, noise: Tensor, cond: Mapping[str, Any], null: Mapping[str, Any] | None = None, *,
        height: Number = None, width: Number = None, num_frames: Number = None, guidance_scale: float | None = None,
        edit: Tensor | None = None, source: NoiseSource | None = None, progress: Progress = False,
        pause: Pause | None = None,
    ) -> Tensor:  # fmt: skip
        """Clean latents [B, C, T, H, W], float32, from `noise` of that shape.

        `model(x, timestep, **cond)` gets timestep [B]; `cond` and `null` are described at `guidance.guided`; `edit`,
        `source` and `progress` at `euler`, `pause` at `common.Pause`. `guidance_scale` overrides `cfg_scale`.
        """
        times = sampling_times(self.num_sampling_steps, self.num_timesteps, self.use_discrete_timesteps)
        times = self._transform(times[:, None], (height, width, num_frames))  # [N + 1, 1 or B]
        denoise = guided(model, cond, null, self.cfg_scale if guidance_scale is None else guidance_scale)

        def velocity(x: Tensor, time: Tensor, **frames: Tensor) -> Tensor:
            return denoise(x, time * self.num_timesteps, **frames)

        return euler(velocity, noise, times, edit, source, progress, pause)

    def training_times(
        self, draw: Tensor, height: Number = None, width: Number = None, num_frames: Number = None
    ) -> Tensor:
        """Times [B] for random numbers `draw` [B]: standard normal for "logit-normal", otherwise uniform in [0, 1)."""
        times = draw
        if self.sample_method == "logit-normal":
            times = torch.sigmoid(self.loc + self.scale * draw)
        elif self.use_discrete_timesteps:
            times = (draw * self.num_timesteps).floor() / self.num_timesteps
        return self._transform(times, (height, width, num_frames), self.transform_scale)

    def training_loss(
        self, model: Denoiser, x_start: Tensor, cond: Mapping[str, Any], *,
        height: Number = None, width: Number = None, num_frames: Number = None,
        noise: Tensor | None = None, time: Tensor | None = None, mask: Tensor | None = None,
        weights: Tensor | None = None, generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean squared error of the predicted velocity, per sample: float32 [B].

        Only the first C channels that `model(x, timestep, **cond)` gives count. Frames where `mask` [B, T] is False are
        fed clean, told to the model as `x_mask`, and left out of the mean (a sample without any True frame has loss 0).
        `weights` [num_timesteps] multiplies each loss by the entry of its nearest whole timestep. `noise` and `time`
        ([B], used as it is) are drawn when absent: from `generator`, which lives on any device, or from the default
        generator of the device of `x_start`.
        """
        device = x_start.device if generator is None else generator.device
        if time is None:
            draw = torch.randn if self.sample_method == "logit-normal" else torch.rand
            drawn = draw(len(x_start), generator=generator, device=device).to(x_start.device)
            time = self.training_times(drawn, height, width, num_frames)
        if noise is None:
            noise = torch.randn(x_start.shape, generator=generator, device=device).to(x_start.device)
        x_time, timestep, frames = add_noise(x_start, noise, time), time * self.num_timesteps, {}
        if mask is not None:
            mask = mask.bool()
            x_time = torch.where(per_frame(mask), x_time, x_start)
            frames["x_mask"] = mask
        predicted = model(x_time, timestep, **cond, **frames)[:, : x_start.shape[1]]
        error = (predicted.float() - (x_start.float() - noise.float())).square().mean(dim=(1, 3, 4))  # [B, T]
        loss = common.frame_mean(error, mask)
        if weights is not None:
            loss = loss * weights[timestep.round().long().clamp(max=len(weights) - 1)]
        return loss

    def _transform(self, times: Tensor, size: tuple[Number, Number, Number], scale: float = 1.0) -> Tensor:
        if not self.use_timestep_transform:
            return times
        if any(value is None for value in size):
            raise ValueError("use_timestep_transform needs height, width and num_frames of the video")
        return timestep_transform(times, *size, scale)


def add_noise(x: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """The point at `time` [B] on the line from data `x` to `noise`: (1 - time) x + time noise."""
    time = per_sample(time)
    return (1 - time) * x + time * noise


@torch.no_grad()
def euler(
    velocity: Denoiser, noise: Tensor, times: Tensor,
    edit: Tensor | None = None, source: NoiseSource | None = None, progress: Progress = False,
    pause: Pause | None = None,
) -> Tensor:  # fmt: skip
    """Clean latents [B, C, T, H, W], float32: Euler's method from `times[0]` to `times[-1]`.

    `velocity(x, time)` is called with the rows [1 or B] of `times` [N + 1, 1 or B], which fall.

    `edit` [B, T] holds frames of `noise` that are in truth clean: 0 keeps a frame, 1 generates it, a value between
    leaves it alone until time has fallen to that value, then noises it to that time and generates from there. The model
    is told which frames are active: `velocity(x, time, x_mask=active)`, bool [B, T]. Each step draws one tensor of the
    latents' shape from `source`: a generator per sample (then results do not depend on the batch), or a callable.
    Without `edit`, or when it is 1 everywhere, no mask is passed and nothing is drawn, which is exact. `progress` shows
    a bar, or is called with (steps done, steps); `pause` is described at `common.Pause`. Raises ValueError when `edit`
    needs random numbers from no `source`.
    """
    pause = pause or Pause()
    x, kept = pause.take("x", noise.float()), {}
    times, num_steps = times.to(x.device), len(times) - 1
    edit = common.edited(edit, x)
    if edit is not None:
        if source is None:
            raise ValueError("frames are kept or edited, which draws noise; pass one generator per sample as source")
        kept["given"] = pause.take("given", edit < 1)
    for step in common.counted(num_steps, progress, pause):
        time, following = times[step], times[step + 1]
        stride, ahead = per_sample(time - following), per_sample(following)
        if edit is None:
            v = velocity(x, time)
            x = x + v * stride
        else:
            active = edit >= time[:, None]
            x = torch.where(per_frame(active & kept["given"]), add_noise(x, common.draw(source, x), time), x)
            kept["given"] = kept["given"] & ~active
            v = velocity(x, time, x_mask=active)
            x = torch.where(per_frame(active), x + v * stride, x)
            ahead = ahead * per_frame(active)
    return pause.leave(num_steps, x, x + v * ahead, **kept)


def timestep_transform(
    time: Tensor, height: float | Tensor, width: float | Tensor, num_frames: float | Tensor,
    scale: float = 1.0, base_resolution: float = 512 * 512, base_num_frames: float = 1,
) -> Tensor:  # fmt: skip
    """`time` (0..1, broadcast against the samples) shifted towards noise for large videos; keeps 0 and 1 in place.

    The shift is r t / (1 + (r - 1) t) with r = scale * sqrt(height * width / base_resolution) * sqrt(latent frames /
    base_num_frames): Esser et al. 2024 (Stable Diffusion 3, arXiv:2403.03206), section 5.3.2, with time added.
    `height` and `width` are pixels, `num_frames` pixel frames. A batch whose first sample is an image is a batch of
    images. Videos shorter than one chunk (2 to 16 frames) count as one chunk; Open-Sora 1.2 counted zero latent frames
    there, which gives r = 0: time 0 everywhere and 0/0 at time 1.
    """
    height, width, num_frames = (torch.as_tensor(one).to(time).reshape(-1) for one in (height, width, num_frames))
    chunks = (num_frames // CHUNK).clamp(min=1)
    latent_frames = torch.where(num_frames[:1] == 1, 1.0, chunks * CHUNK_LATENTS)
    ratio = scale * (height * width / base_resolution).sqrt() * (latent_frames / base_num_frames).sqrt()
    return ratio * time / (1 + (ratio - 1) * time)


def sampling_times(num_steps: int, num_timesteps: int = 1000, discrete: bool = False) -> Tensor:
    """The times 1, 1 - 1 / N, ..., 0 of N steps, float32 [N + 1] on the CPU; `discrete`: rounded to whole timesteps."""
    times = [1 - step / num_steps for step in range(num_steps + 1)]
    if discrete:
        times = [round(time * num_timesteps) / num_timesteps for time in times]
    return torch.tensor(times, dtype=torch.float32)
