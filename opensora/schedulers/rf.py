"""Rectified flow (Liu et al. 2022, arXiv:2209.03003): straight lines between noise and data.

Axes: latents [B, C, T, H, W], times [B] in 0..1 (1 noise, 0 data), frame masks [B, T]. A velocity points from noise to
data: data - noise. The model gets times as timesteps 0..num_timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opensora.errors import ConfigError
from opensora.schedulers import common
from opensora.schedulers.common import NoiseSource, Number, SamplerState, per_frame, per_sample
from opensora.schedulers.guidance import Conditioning, Denoiser
from opensora.schedulers.sampler import Sampler, Size

CHUNK, CHUNK_LATENTS = 17, 5  # pixel frames that the video autoencoder encodes together, and their latent frames
MIN_TIME = 0.02  # of perturbed samples, whose velocities grow as 1 / time
MAX_CHURN = 2**0.5 - 1  # growth of sigma in a step, as in EDM: no more new noise than there is already


@dataclass(frozen=True)
class RFLOW(Sampler):
    """Rectified flow, training loss and sampler; its fields are the keys of a configuration.

    `use_timestep_transform` shifts times by video size (timestep shift); training multiplies by `transform_scale` too;
    `sample_method="logit-normal"` draws training times as sigmoid(Normal(`loc`, `scale`)). Both are from Esser et al.
    2024 (Stable Diffusion 3, arXiv:2403.03206). `height` and `width` (pixels) and `num_frames` (pixel frames) of a
    video are used by the transform only. `s_churn` above 0 samples stochastically, see `churned`. Raises ConfigError
    for invalid settings.
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
    s_churn: float = 0.0

    supports_edit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        common.check(self, ("num_sampling_steps", "num_timesteps"), sample_method=("uniform", "logit-normal"))
        if self.sample_method == "logit-normal" and self.use_discrete_timesteps:
            remedy = "set use_discrete_timesteps=False or sample_method='uniform'"
            raise ConfigError(f"scheduler: sample_method 'logit-normal' draws continuous times; {remedy}")

    @property
    def draws_noise(self) -> bool:  # edited frames draw noise in any case
        return self.s_churn > 0

    @property
    def gamma(self) -> float:
        """Growth of the noise in a step before it is removed, at most `MAX_CHURN`; 0 without churn."""
        return min(self.s_churn / self.num_steps, MAX_CHURN)

    @property
    def num_steps(self) -> int:
        return self.num_sampling_steps

    def timesteps(self, height: Number = None, width: Number = None, num_frames: Number = None) -> list[float]:
        times = self._sampling_times((height, width, num_frames))[:-1, 0]
        return (churned_time(times, self.gamma) * self.num_timesteps).tolist()

    def _solve(
        self, denoise: Denoiser, state: SamplerState, size: Size, edit: Tensor | None, source: NoiseSource | None
    ) -> Iterator[SamplerState]:
        times = common.upload(self._sampling_times(size), state.x)

        def velocity(x: Tensor, time: Tensor, **masks: Tensor) -> Tensor:
            return denoise(x, time * self.num_timesteps, **masks)

        if edit is None:
            return euler(velocity, state, times, self.gamma, source)
        return euler_edit(velocity, state, times, common.upload(edit, state.x), self.gamma, source)

    def _sampling_times(self, size: Size) -> Tensor:
        """The times [N + 1, 1 or B] of a run."""
        times = sampling_times(self.num_sampling_steps, self.num_timesteps, self.use_discrete_timesteps)
        return self._transform(times[:, None], size)

    def training_times(
        self, drawn: Tensor, height: Number = None, width: Number = None, num_frames: Number = None
    ) -> Tensor:
        """Times [B] from random numbers `drawn` [B]: standard normal for "logit-normal", else uniform in [0, 1)."""
        times = drawn
        if self.sample_method == "logit-normal":
            times = torch.sigmoid(self.loc + self.scale * drawn)
        elif self.use_discrete_timesteps:
            times = (drawn * self.num_timesteps).floor() / self.num_timesteps
        return self._transform(times, (height, width, num_frames), self.transform_scale)

    def training_loss(
        self, model: Denoiser, x_start: Tensor, cond: Conditioning, *,
        height: Number = None, width: Number = None, num_frames: Number = None,
        noise: Tensor | None = None, time: Tensor | None = None, mask: Tensor | None = None,
        weights: Tensor | None = None, generator: torch.Generator | None = None,
        perturb: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean squared error of the predicted velocity, per sample: float32 [B].

        Only the first C predicted channels count. Frames where `mask` [B, T] is False stay clean, are marked for
        the model by `x_mask`, and are left out of the mean (a sample without any True frame has loss 0).
        `weights` [num_timesteps] multiplies each loss by the entry of its nearest whole timestep. `noise` and `time`
        ([B], not transformed) are drawn when absent: from `generator`, which lives on any device, or from the default
        generator of the device of `x_start`.

        `perturb` gives, for times [B], errors [B, C, T, H, W] of the data that are noised. The velocity to predict
        still leads to `x_start`, so that the model learns to correct such errors.
        """
        device = x_start.device if generator is None else generator.device
        if time is None:
            random = torch.randn if self.sample_method == "logit-normal" else torch.rand
            drawn = random(len(x_start), generator=generator, device=device)
            time = common.upload(self.training_times(drawn, height, width, num_frames), x_start)
        if noise is None:
            noise = common.upload(torch.randn(x_start.shape, generator=generator, device=device), x_start)
        if perturb is None:
            x_t, velocity = add_noise(x_start, noise, time), x_start.float() - noise.float()
        else:
            time = time.clamp(min=MIN_TIME)
            x_t = add_noise(x_start + perturb(time).to(x_start), noise, time)
            velocity = (x_start - x_t).float() / per_sample(time)
        timestep, masks = time * self.num_timesteps, {}
        if mask is not None:
            mask = mask.bool()
            x_t = torch.where(per_frame(mask), x_t, x_start)
            masks["x_mask"] = mask
        predicted = model(x_t, timestep, **cond, **masks)[:, : x_start.shape[1]]
        error = (predicted.float() - velocity).square().mean(dim=(1, 3, 4))  # [B, T]
        loss = common.frame_mean(error, mask)
        if weights is not None:
            loss = loss * common.upload(weights, loss)[timestep.round().long().clamp(max=len(weights) - 1)]
        return loss

    def _transform(self, times: Tensor, size: tuple[Number, Number, Number], scale: float = 1.0) -> Tensor:
        if not self.use_timestep_transform:
            return times
        height, width, num_frames = size
        if height is None or width is None or num_frames is None:
            raise ValueError("use_timestep_transform needs height, width and num_frames of the video")
        return timestep_transform(times, height, width, num_frames, scale)


def add_noise(x: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """`x` noised to `time` [B]: (1 - time) x + time noise."""
    time = per_sample(time)
    return (1 - time) * x + time * noise


Velocity = Callable[..., Tensor]  # (x [B, C, T, H, W], time [1 or B], x_mask=[B, T]) -> data - noise


def euler(
    velocity: Velocity, state: SamplerState, times: Tensor, gamma: float = 0.0, source: NoiseSource | None = None
) -> Iterator[SamplerState]:
    """Euler's method from `state` over `times` [N + 1, 1 or B], which fall from 1 to 0; yields each state.

    With `gamma` above 0 every step first goes back to more noise (`churned`), with one tensor like `x` from `source`.
    """
    x, num_steps = state.x, len(times) - 1
    for step in range(state.step, num_steps):
        time, next_time = times[step], times[step + 1]
        if gamma:
            x, time = churned(x, time, gamma, common.draw(source, x))
        v = velocity(x, time)
        x = x + v * per_sample(time - next_time)
        yield SamplerState(step + 1, num_steps, x, x + v * per_sample(next_time))


def euler_edit(
    velocity: Velocity,
    state: SamplerState,
    times: Tensor,
    edit: Tensor,
    gamma: float,
    source: NoiseSource | None,
) -> Iterator[SamplerState]:
    """As `euler`, where frames whose `edit` [B, T] is below 1 start as clean latents.

    Such a frame is unchanged until the time has fallen to its `edit`, then noised to that time and denoised from there
    on. Every step draws one tensor like `x`, with `gamma` a second one. `carry["given"]` marks the frames that are
    still clean.
    """
    x, num_steps, clean = state.x, len(times) - 1, state.carried("given", edit < 1)
    for step in range(state.step, num_steps):
        time, next_time = times[step], times[step + 1]
        active = edit >= time[:, None]
        x = torch.where(per_frame(active & clean), add_noise(x, common.draw(source, x), time), x)
        clean = clean & ~active
        if gamma:
            noisier, time = churned(x, time, gamma, common.draw(source, x))
            x = torch.where(per_frame(active), noisier, x)
        v = velocity(x, time, x_mask=active)
        x = torch.where(per_frame(active), x + v * per_sample(time - next_time), x)
        x0 = x + v * (per_sample(next_time) * per_frame(active))
        yield SamplerState(step + 1, num_steps, x, x0, {"given": clean})


def churned(x: Tensor, time: Tensor, gamma: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """`x` at `time` [1 or B] with more of standard-normal `noise`, and its new time.

    The churn of Karras et al. 2022 (EDM, arXiv:2206.00364, algorithm 2), with sigma = time / (1 - time): what earlier
    steps got wrong is drawn again. Pure noise, at time 1, stays as it is.
    """
    later = churned_time(time, gamma)
    kept = torch.where(time < 1, 1 / (1 + gamma * time), 1)  # (1 - later) / (1 - time)
    added = (later.square() - (kept * time).square()).clamp(min=0).sqrt()
    return per_sample(kept) * x + per_sample(added) * noise, later


def churned_time(time: Tensor, gamma: float) -> Tensor:
    """The time at which sigma = time / (1 - time) is 1 + gamma times as large."""
    return (1 + gamma) * time / (1 + gamma * time)


def timestep_transform(
    time: Tensor, height: float | Tensor, width: float | Tensor, num_frames: float | Tensor,
    scale: float = 1.0, base_resolution: float = 512 * 512, base_num_frames: float = 1,
) -> Tensor:  # fmt: skip
    """Timestep shift: moves `time` (0..1, broadcast against the samples) towards noise for large videos; 0 and 1 stay.

    The shift is r t / (1 + (r - 1) t) with r = scale * sqrt(height * width / base_resolution) * sqrt(latent frames /
    base_num_frames): Esser et al. 2024 (Stable Diffusion 3, arXiv:2403.03206), section 5.3.2, extended to videos.
    `height` and `width` are pixels, `num_frames` pixel frames. A batch whose first sample is an image is a batch of
    images. Videos shorter than one chunk (2 to 16 frames) count as one chunk; Open-Sora 1.2 counted zero latent frames
    there, which gives r = 0: time 0 everywhere and 0/0 at time 1.
    """
    height, width, num_frames = (torch.as_tensor(value).to(time).reshape(-1) for value in (height, width, num_frames))
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
