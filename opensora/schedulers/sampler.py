"""The base class of the samplers: their shared signature, guidance, resuming."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from opensora.schedulers.common import NoiseSource, Number, SamplerState
from opensora.schedulers.guidance import Conditioning, Denoiser, GuidedDenoiser, num_branches

Size = tuple[Number, Number, Number]  # height and width in pixels, pixel frames


class Sampler(ABC):
    """Turns noise into latents step by step. The fields of the subclasses are the settings."""

    cfg_scale: float
    supports_edit: ClassVar[bool]  # whether it can keep or edit given frames

    @property
    def draws_noise(self) -> bool:
        """Whether sampling without `edit` needs a `source`."""
        return False

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """Number of steps of a whole run, and of states that `steps` yields."""

    @abstractmethod
    def timesteps(self, height: Number = None, width: Number = None, num_frames: Number = None) -> list[float]:
        """The timestep of each step (of its first evaluation), for a video of this size."""

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the guided model in a whole run."""
        return self.num_steps

    @property
    def num_branches(self) -> int:
        """Guidance branches of each evaluation at `cfg_scale`."""
        return num_branches(self.cfg_scale)

    def guided_channels(self, channels: int) -> int | None:
        """Guided channels if the model also predicts a variance; None if only the first `channels` are used."""
        return None

    @torch.no_grad()
    def steps(
        self, model: Denoiser, noise: Tensor, cond: Conditioning, null: Conditioning | None = None, *,
        height: Number = None, width: Number = None, num_frames: Number = None, guidance_scale: float | None = None,
        edit: Tensor | None = None, source: NoiseSource | None = None, resume: SamplerState | None = None,
        sequential_cfg: bool = False, precompute: bool = False,
    ) -> Iterator[SamplerState]:  # fmt: skip
        """Yields the state after every step, from `noise` [B, C, T, H, W]; the last `x` is the sample, float32.

        model, cond, null, precompute: see `GuidedDenoiser`
        height, width, num_frames: of the video in pixels and pixel frames, for timestep transforms
        guidance_scale: overrides `cfg_scale`
        edit: [B, T]; frames of `noise` with a value below 1 hold clean latents. 0 keeps a frame, a value between
            noises it to that time and denoises it again (SDEdit). The model gets `x_mask` [B, T] bool, True for frames
            to generate. None, or 1 everywhere, generates all frames without a mask.
        source: random numbers of the steps: a generator per sample (results then do not depend on the batch), or a
            function that draws a tensor of the latents' shape
        resume: a state that an earlier run yielded; `source` must continue in the state that it had then
        sequential_cfg: evaluate the guidance branches one after the other, which takes less memory
        Raises ValueError if `source` is needed but absent, ConfigError if the sampler does not support an argument.
        """
        scale = self.cfg_scale if guidance_scale is None else guidance_scale
        channels = self.guided_channels(noise.shape[1])
        denoise = GuidedDenoiser(
            model, cond, null, scale, channels, sequential=sequential_cfg, precompute=precompute
        )  # fmt: skip
        x = noise.float()
        start = SamplerState(0, self.num_steps, x, x) if resume is None else resume.to(x)
        edit = None if edit is None or bool((edit >= 1).all()) else edit.to(x.dtype)
        yield from self._solve(denoise, start, (height, width, num_frames), edit, source)

    def sample(self, *args: Any, **options: Any) -> Tensor:
        """The sample [B, C, T, H, W], float32: `x` of the last state of `steps`, with the same arguments."""
        for state in self.steps(*args, **options):  # noqa: B007
            pass
        return state.x

    @abstractmethod
    def _solve(
        self, denoise: Denoiser, state: SamplerState, size: Size, edit: Tensor | None, source: NoiseSource | None
    ) -> Iterator[SamplerState]:
        """Yields the states after `state`. `denoise` is guided; `edit` is on any device, None for a full generation."""
