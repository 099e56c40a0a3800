"""Improved DDPM (Nichol and Dhariwal 2021, arXiv:2102.09672): noise removed in discrete steps, the variance learned.

Axes: latents [B, C, T, H, W], steps t [B] of the process from N - 1 (noise) to 0, frame masks [B, T]. The model gets
the original timestep of a step, 0..diffusion_steps - 1, and gives C channels of noise (or of clean latents, with
`predict_xstart`), then C of variance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from opensora.errors import ConfigError
from opensora.schedulers import common
from opensora.schedulers.common import NoiseSource, Number, SamplerState, per_frame, per_sample
from opensora.schedulers.diffusion import NOISE_SCHEDULES, Diffusion, look_up, space_timesteps
from opensora.schedulers.guidance import Conditioning, Denoiser
from opensora.schedulers.sampler import Sampler, Size

TABLES = {"float64": torch.float64, "float32": torch.float32}


class Prediction(NamedTuple):
    """The mean and log variance of x_{t-1}, and the clean latents, that a model predicts."""

    mean: Tensor
    log_variance: Tensor
    x_start: Tensor


@dataclass(frozen=True)
class IDDPM(Sampler):
    """IDDPM, training loss and sampler; its fields are the keys of a configuration.

    The process keeps `num_sampling_steps` of the `diffusion_steps` timesteps, or those of `timestep_respacing`
    (`diffusion.space_timesteps`), or all. `cfg_channel` latent channels are guided, all by default. `ddim_eta` samples
    by DDIM with that share of noise, 0 to 1, instead of ancestrally. Without `learn_sigma` the variance is beta, or
    with `sigma_small` that of the posterior. `use_kl` trains on the whole variational bound; `rescale_learned_sigmas`
    scales the bound's share of the usual loss. `tables="float32"` repeats a rounding of Open-Sora 1.1 and 1.2, see
    `diffusion.Diffusion`. Raises ConfigError for invalid settings.
    """

    num_sampling_steps: int | None = None
    timestep_respacing: str | None = None
    noise_schedule: str = "linear"
    use_kl: bool = False
    sigma_small: bool = False
    predict_xstart: bool = False
    learn_sigma: bool = True
    rescale_learned_sigmas: bool = False
    diffusion_steps: int = 1000
    cfg_scale: float = 4.0
    cfg_channel: int | None = None
    ddim_eta: float | None = None
    tables: str = "float64"

    draws_noise: ClassVar[bool] = True
    supports_edit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive = ("num_sampling_steps", "diffusion_steps", "cfg_channel")
        common.check(self, positive, noise_schedule=NOISE_SCHEDULES, tables=TABLES)
        if self.num_sampling_steps and self.timestep_respacing:
            raise ConfigError("scheduler: num_sampling_steps and timestep_respacing exclude each other; give one")
        if not 0 <= (self.ddim_eta or 0) <= 1:
            raise ConfigError(f"scheduler: ddim_eta is {self.ddim_eta}; it must be between 0 and 1")
        _ = self.process  # refuses a respacing that cannot be

    @cached_property
    def process(self) -> Diffusion:
        """The diffusion process on the kept timesteps."""
        sections = self.timestep_respacing or [self.num_sampling_steps or self.diffusion_steps]
        kept = space_timesteps(self.diffusion_steps, sections)
        return Diffusion(NOISE_SCHEDULES[self.noise_schedule](self.diffusion_steps), kept, TABLES[self.tables])

    @cached_property
    def _placed(self) -> dict[tuple[torch.device, torch.dtype], Diffusion]:
        return {}

    def process_on(self, x: Tensor) -> Diffusion:
        """The process on the device and in the dtype of `x`. Its tables are copied once, not in every step."""
        key = (x.device, x.dtype)
        if key not in self._placed:
            self._placed[key] = self.process.to(x)
        return self._placed[key]

    @property
    def num_steps(self) -> int:
        return len(self.process)

    def timesteps(self, height: Number = None, width: Number = None, num_frames: Number = None) -> list[float]:
        return self.process.timestep_map.flip(0).float().tolist()

    def guided_channels(self, channels: int) -> int:
        """Raises ConfigError if `cfg_channel` is more than there are channels."""
        if (self.cfg_channel or 0) > channels:
            raise ConfigError(f"scheduler: cfg_channel is {self.cfg_channel}, but latents have {channels} channels")
        return self.cfg_channel or channels

    def _solve(
        self, denoise: Denoiser, state: SamplerState, size: Size, edit: Tensor | None, source: NoiseSource | None
    ) -> Iterator[SamplerState]:
        """Each step draws a tensor from `source`, with `edit` one more before it.

        A frame whose `edit` is m is left alone until step int(m N), noised to that step, and generated from there. So a
        frame with 0 is kept but for the last step, which noises it to the lowest level and cleans it again. `x_mask`
        holds the frames with int(m N) above the step.
        """
        if source is None:
            raise ValueError("iddpm draws noise in every step; pass one generator per sample as source")
        x, num_steps = state.x, self.num_steps
        starts = None if edit is None else (edit * num_steps).long()
        edited = None if starts is None else (starts < num_steps).any(dim=1).tolist()
        starts = None if starts is None else common.upload(starts, x)
        for step in range(state.step, num_steps):
            x, x0 = self.step(denoise, x, num_steps - 1 - step, source, starts, edited)
            yield SamplerState(step + 1, num_steps, x, x0)

    def step(
        self, denoise: Denoiser, x: Tensor, index: int, source: NoiseSource, starts: Tensor | None,
        edited: Sequence[bool] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`x` at step `index` - 1 from `x` at step `index`, and the predicted clean latents.

        `denoise(x, timestep)` gives all channels of the model. A frame is left alone as long as `index` is above its
        entry of `starts` (int64 [B, T]), and noised first where both are equal. Samples without such a frame, False in
        `edited` [B], draw no numbers for it.
        """
        process, t, frames = self.process_on(x), torch.full((len(x),), index, device=x.device), {}
        if starts is not None:
            noised = process.q_sample(x, t, common.draw(source, x, edited))
            x = torch.where(per_frame(starts == index), noised, x)
            frames["x_mask"] = starts > index
        predicted = self.predict(denoise(x, process.timestep(t, x), **frames), x, t)
        noise = common.draw(source, x)
        if self.ddim_eta is None:
            moved = ancestral_step(predicted, t, noise)
        else:
            moved = ddim_step(process, x, predicted.x_start, t, noise, self.ddim_eta)
        if starts is None:
            return moved, predicted.x_start
        started = per_frame(starts >= index)
        return torch.where(started, moved, x), torch.where(started, predicted.x_start, x)

    def predict(self, output: Tensor, x: Tensor, t: Tensor, clip: bool = False) -> Prediction:
        """The prediction of `output` for `x` at `t`; `clip` clamps clean latents to -1..1 (DDPM, algorithm 2)."""
        channels, process = x.shape[1], self.process_on(x)
        if self.learn_sigma and output.shape[1] != 2 * channels:
            raise ValueError(f"learn_sigma needs {2 * channels} channels from the model; it gave {output.shape[1]}")
        if self.learn_sigma:
            log_variance = process.learned_log_variance(output[:, channels:], t)
        else:
            low = process.posterior_log_variance_clipped
            table = low if self.sigma_small else torch.cat([low[:1], process.log_betas[1:]])
            log_variance = look_up(table, t, x)
        output = output[:, :channels]
        x_start = output if self.predict_xstart else process.x_start_of(x, t, output)
        if clip:
            x_start = x_start.clamp(-1, 1)
        return Prediction(process.q_posterior(x_start, x, t)[0], log_variance, x_start)

    def training_loss(
        self, model: Denoiser, x_start: Tensor, cond: Conditioning, *,
        height: Number = None, width: Number = None, num_frames: Number = None, **given: Any,
    ) -> Tensor:  # fmt: skip
        """The "loss" of `training_terms`, float32 [B]; sizes have no effect."""
        return self.training_terms(model, x_start, cond, **given)["loss"]

    def training_terms(
        self, model: Denoiser, x_start: Tensor, cond: Conditioning, *,
        noise: Tensor | None = None, timestep: Tensor | None = None, mask: Tensor | None = None,
        weights: Tensor | None = None, generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """`loss` and its terms, each float32 [B].

        `loss` is `mse`, the squared error of the prediction, plus `vb`, the variational bound in bits, which teaches
        the variance alone (L_hybrid of IDDPM, section 3.1); with `use_kl` it is the bound times N. Frames where `mask`
        [B, T] is False get the noise of step 0, are passed to the model as `x_mask`, and do not count (a sample without
        any True frame has loss 0). `weights` [N] multiply the `mse` of their steps. `timestep`, steps of the process
        as int64 [B], and `noise` are drawn when absent: from `generator`, which lives on any device, or from the
        default generator of the device of `x_start`.
        """
        device, frames = x_start.device if generator is None else generator.device, {}
        t = self.draw_steps(len(x_start), generator, device) if timestep is None else timestep
        if noise is None:
            noise = common.upload(torch.randn(x_start.shape, generator=generator, device=device), x_start)
        t, process = common.upload(t, x_start), self.process_on(x_start)
        x = process.q_sample(x_start, t, noise)
        if mask is not None:
            mask = mask.bool()
            x = torch.where(per_frame(mask), x, process.q_sample(x_start, torch.zeros_like(t), noise))
            frames["x_mask"] = mask
        output = model(x, process.timestep(t, x), **cond, **frames).float()
        if self.use_kl:
            return {"loss": self._bound(output, x_start, x, t, mask) * len(self.process)}

        channels = x.shape[1]
        target = x_start if self.predict_xstart else noise
        error = (output[:, :channels] - target).square().mean(dim=(1, 3, 4))  # [B, T]
        terms = {"mse": common.frame_mean(error, mask)}
        if weights is not None:
            terms["mse"] = terms["mse"] * common.upload(weights, x)[t]
        if self.learn_sigma:
            scale = len(self.process) / 1000 if self.rescale_learned_sigmas else 1.0
            only_variance = torch.cat([output[:, :channels].detach(), output[:, channels:]], dim=1)
            terms["vb"] = self._bound(only_variance, x_start, x, t, mask) * scale
        return {**terms, "loss": terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]}

    def draw_steps(self, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Steps to train on, int64 [count], uniform in 0..N - 1."""
        return torch.randint(len(self.process), (count,), generator=generator, device=device)

    def _bound(self, output: Tensor, x_start: Tensor, x: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
        predicted = self.predict(output, x, t)
        bits = self.process_on(x).bound(x_start, x, t, predicted.mean, predicted.log_variance)
        return common.frame_mean(bits.mean(dim=(1, 3, 4)), mask)


def ancestral_step(predicted: Prediction, t: Tensor, noise: Tensor) -> Tensor:
    """x_{t-1} drawn from its predicted distribution (DDPM, algorithm 2); at t = 0 its mean."""
    deviation = torch.exp(predicted.log_variance / 2) * per_sample(t > 0).to(noise)
    return predicted.mean + deviation * noise


def ddim_step(
    process: Diffusion, x: Tensor, x_start: Tensor, t: Tensor, noise: Tensor | None = None, eta: float = 0.0
) -> Tensor:
    """x_{t-1} by DDIM (Song et al. 2020, arXiv:2010.02502, equations 12 and 16); `eta` 0 needs no noise."""
    now, before = (look_up(table, t, x) for table in (process.alphas_cumprod, process.alphas_cumprod_prev))
    sigma = eta * ((1 - before) / (1 - now)).sqrt() * (1 - now / before).sqrt()
    moved = before.sqrt() * x_start + (1 - before - sigma.square()).sqrt() * process.eps_of(x, t, x_start)
    return moved if noise is None else moved + sigma * noise


def ddim_reverse_step(process: Diffusion, x: Tensor, x_start: Tensor, t: Tensor) -> Tensor:
    """x_{t+1} on the path that DDIM without noise follows (DDIM, equation 14): from data towards noise."""
    after = look_up(process.alphas_cumprod_next, t, x)
    return after.sqrt() * x_start + (1 - after).sqrt() * process.eps_of(x, t, x_start)
