"""Improved DDPM (Nichol and Dhariwal 2021, arXiv:2102.09672): discrete steps, learned variance.

Axes: latents [B, C, T, H, W], steps t [B] from N - 1 (noise) to 0, frame masks [B, T]. The model gets the timestep of a
step before respacing, 0..diffusion_steps - 1, and predicts C channels of noise (or of clean latents, with
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

    The steps are `num_sampling_steps` of the `diffusion_steps` timesteps, or those of `timestep_respacing`
    (`diffusion.space_timesteps`), or all. `cfg_channel` latent channels are guided, all by default. `ddim_eta` (eta, 0
    to 1) samples by DDIM instead of ancestral sampling. Without `learn_sigma` the variance is beta, or
    with `sigma_small` that of the posterior. `use_kl` trains on the variational bound alone; `rescale_learned_sigmas`
    scales the bound in the default loss. `tables="float32"` rounds as Open-Sora 1.1 and 1.2 did, see
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

    supports_edit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive = ("num_sampling_steps", "diffusion_steps", "cfg_channel")
        common.check(self, positive, noise_schedule=NOISE_SCHEDULES, tables=TABLES)
        if self.num_sampling_steps and self.timestep_respacing:
            raise ConfigError("scheduler: num_sampling_steps and timestep_respacing exclude each other; give one")
        if not 0 <= (self.ddim_eta or 0) <= 1:
            raise ConfigError(f"scheduler: ddim_eta is {self.ddim_eta}; it must be between 0 and 1")
        _ = self.process  # raises ConfigError for an invalid respacing

    @cached_property
    def process(self) -> Diffusion:
        """The diffusion process on the timesteps of the steps."""
        sections = self.timestep_respacing or [self.num_sampling_steps or self.diffusion_steps]
        kept = space_timesteps(self.diffusion_steps, sections)
        return Diffusion(NOISE_SCHEDULES[self.noise_schedule](self.diffusion_steps), kept, TABLES[self.tables])

    @cached_property
    def _process_copies(self) -> dict[tuple[torch.device, torch.dtype], Diffusion]:
        return {}

    def process_on(self, x: Tensor) -> Diffusion:
        """The process on the device and in the dtype of `x`. Its tables are copied once, not in every step."""
        key = (x.device, x.dtype)
        if key not in self._process_copies:
            self._process_copies[key] = self.process.to(x)
        return self._process_copies[key]

    @property
    def draws_noise(self) -> bool:
        return True

    @property
    def num_steps(self) -> int:
        return len(self.process)

    def timesteps(self, height: Number = None, width: Number = None, num_frames: Number = None) -> list[float]:
        return self.process.timestep_map.flip(0).float().tolist()

    def guided_channels(self, channels: int) -> int:
        """Raises ConfigError if `cfg_channel` is above `channels`."""
        if (self.cfg_channel or 0) > channels:
            raise ConfigError(f"scheduler: cfg_channel is {self.cfg_channel}, but latents have {channels} channels")
        return self.cfg_channel or channels

    def _solve(
        self, denoise: Denoiser, state: SamplerState, size: Size, edit: Tensor | None, source: NoiseSource | None
    ) -> Iterator[SamplerState]:
        """Each step draws one tensor from `source`; with `edit`, another one first.

        A frame with `edit` m is unchanged down to step int(m N), noised there, and denoised from that step on. So a
        frame with 0 is changed by the last step only, which adds the least noise and removes it again. `x_mask` marks
        the frames with int(m N) above the step.
        """
        x, num_steps = state.x, self.num_steps
        start_steps = None if edit is None else (edit * num_steps).long()
        edited = None if start_steps is None else (start_steps < num_steps).any(dim=1).tolist()
        start_steps = None if start_steps is None else common.upload(start_steps, x)
        for step in range(state.step, num_steps):
            x, x0 = self.step(denoise, x, num_steps - 1 - step, source, start_steps, edited)
            yield SamplerState(step + 1, num_steps, x, x0)

    def step(
        self, denoise: Denoiser, x: Tensor, index: int, source: NoiseSource | None, start_steps: Tensor | None,
        edited: Sequence[bool] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`x` at step `index` - 1 from `x` at step `index`, and the predicted clean latents.

        `denoise(x, timestep)` returns all channels of the model. A frame is unchanged while `index` is above its entry
        of `start_steps` (int64 [B, T]), and noised where both are equal. Samples without edited masks, False in
        `edited` [B], draw no noise for it.
        """
        process, t, masks = self.process_on(x), torch.full((len(x),), index, device=x.device), {}
        if start_steps is not None:
            noised = process.q_sample(x, t, common.draw(source, x, edited))
            x = torch.where(per_frame(start_steps == index), noised, x)
            masks["x_mask"] = start_steps > index
        predicted = self.predict(denoise(x, process.timestep(t, x), **masks), x, t)
        noise = common.draw(source, x)
        if self.ddim_eta is None:
            x_prev = ancestral_step(predicted, t, noise)
        else:
            x_prev = ddim_step(process, x, predicted.x_start, t, noise, self.ddim_eta)
        if start_steps is None:
            return x_prev, predicted.x_start
        active = per_frame(start_steps >= index)
        return torch.where(active, x_prev, x), torch.where(active, predicted.x_start, x)

    def predict(self, output: Tensor, x: Tensor, t: Tensor, clip: bool = False) -> Prediction:
        """What `output` of the model means for `x` at `t`; `clip` clamps x_start to -1..1 (DDPM, algorithm 2)."""
        channels, process = x.shape[1], self.process_on(x)
        if self.learn_sigma and output.shape[1] != 2 * channels:
            raise ValueError(f"learn_sigma needs {2 * channels} channels from the model; it gave {output.shape[1]}")
        if self.learn_sigma:
            log_variance = process.learned_log_variance(output[:, channels:], t)
        else:
            min_log = process.posterior_log_variance_clipped
            table = min_log if self.sigma_small else torch.cat([min_log[:1], process.log_betas[1:]])
            log_variance = look_up(table, t, x)
        output = output[:, :channels]
        x_start = output if self.predict_xstart else process.x_start_from_eps(x, t, output)
        if clip:
            x_start = x_start.clamp(-1, 1)
        return Prediction(process.q_posterior(x_start, x, t)[0], log_variance, x_start)

    def training_loss(
        self, model: Denoiser, x_start: Tensor, cond: Conditioning, *,
        height: Number = None, width: Number = None, num_frames: Number = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """The "loss" of `training_terms`, float32 [B]; sizes have no effect."""
        return self.training_terms(model, x_start, cond, **options)["loss"]

    def training_terms(
        self, model: Denoiser, x_start: Tensor, cond: Conditioning, *,
        noise: Tensor | None = None, timestep: Tensor | None = None, mask: Tensor | None = None,
        weights: Tensor | None = None, generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """`loss` and its terms, each float32 [B].

        `loss` is `mse`, the squared error of the prediction, plus `vb`, the variational bound in bits, which trains
        the variance alone (L_hybrid of IDDPM, section 3.1); with `use_kl` it is the bound times N. Frames where `mask`
        [B, T] is False get the noise of step 0, are marked for the model by `x_mask`, and do not count (a sample
        without any True frame has loss 0). `weights` [N] multiply the `mse` of their steps. `timestep`, steps as int64
        [B], and `noise` are drawn when absent: from `generator`, on any device, or from the default generator of the
        device of `x_start`.
        """
        device, masks = x_start.device if generator is None else generator.device, {}
        t = self.draw_steps(len(x_start), generator, device) if timestep is None else timestep
        if noise is None:
            noise = common.upload(torch.randn(x_start.shape, generator=generator, device=device), x_start)
        t, process = common.upload(t, x_start), self.process_on(x_start)
        x = process.q_sample(x_start, t, noise)
        if mask is not None:
            mask = mask.bool()
            x = torch.where(per_frame(mask), x, process.q_sample(x_start, torch.zeros_like(t), noise))
            masks["x_mask"] = mask
        output = model(x, process.timestep(t, x), **cond, **masks).float()
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
    tables = process.alphas_cumprod, process.alphas_cumprod_prev
    alpha_bar, alpha_bar_prev = (look_up(table, t, x) for table in tables)
    sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()
    eps = process.eps_from_x_start(x, t, x_start)
    x_prev = alpha_bar_prev.sqrt() * x_start + (1 - alpha_bar_prev - sigma.square()).sqrt() * eps
    return x_prev if noise is None else x_prev + sigma * noise


def ddim_reverse_step(process: Diffusion, x: Tensor, x_start: Tensor, t: Tensor) -> Tensor:
    """x_{t+1} by DDIM inversion (eta 0; DDIM, equation 14): from data towards noise."""
    alpha_bar_next = look_up(process.alphas_cumprod_next, t, x)
    return alpha_bar_next.sqrt() * x_start + (1 - alpha_bar_next).sqrt() * process.eps_from_x_start(x, t, x_start)
