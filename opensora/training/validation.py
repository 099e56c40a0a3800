"""Validation loss on held-out clips at fixed timesteps and noise, and sample videos of fixed prompts.

The training loss depends on the timesteps that a step draws. Validation noises every clip to one fixed time in each of
ten bins of the range, so the same weights always give the same numbers. The generators of training are not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from opensora.acceleration.precision import training_context
from opensora.config.settings import TrainSettings
from opensora.datasets.video import to_uint8
from opensora.distributed.collectives import all_gather_objects
from opensora.distributed.process_group import RankLayout
from opensora.pipeline.noise import initial_noise, noise_generator
from opensora.schedulers.iddpm import IDDPM
from opensora.training.data.batch import TrainingBatch
from opensora.training.ema import EMA

BINS = 10  # of the range of timesteps
Results = dict[str, Tensor]  # bucket -> losses of its clips, float64 [N, BINS], from data to noise


class Validation:
    """The losses of a model on held-out `batches`, each with the name of its bucket.

    Every rank holds all batches and evaluates its share. `scheduler` must have `training_loss`.
    """

    def __init__(
        self, model: nn.Module, scheduler: Any, settings: TrainSettings, batches: Sequence[tuple[str, TrainingBatch]],
        layout: RankLayout | None = None,
    ) -> None:  # fmt: skip
        self.model, self.scheduler, self.settings, self.batches = model, scheduler, settings, batches
        self.layout = layout or RankLayout()
        self.device = next(model.parameters()).device

    def due(self, step: int) -> bool:
        """Whether validation is due after `step` steps."""
        return bool(self.settings.validate_every) and step % self.settings.validate_every == 0

    def losses(self, ema: EMA | None = None) -> Results:
        """The losses of all clips, with the averaged weights if given. All ranks call this together and get all."""
        ranks, rank = self.layout.data_size, self.layout.data_rank
        mine = {}
        with inference_mode(self.model, ema):
            for turn in range(-(-len(self.batches) // ranks)):  # a rank without a batch repeats one: all take part
                number = (turn * ranks + rank) % len(self.batches)
                name, batch = self.batches[number]
                losses = self._of_batch(number, batch.to(self.device)).tolist()
                if batch.weight:  # else none of its clips could be read
                    mine[number] = name, losses
        found = {number: one for part in all_gather_objects(mine, self.layout) for number, one in part.items()}
        results: dict[str, list[list[float]]] = {}
        for number in sorted(found):
            name, losses = found[number]
            results.setdefault(name, []).extend(losses)
        return {name: torch.tensor(losses, dtype=torch.float64) for name, losses in results.items()}

    def _of_batch(self, number: int, batch: TrainingBatch) -> Tensor:
        """The losses [B, BINS] of a batch; the noise of a clip depends on its place and the bin."""
        return torch.stack([self._of_bin(number, batch, index) for index in range(BINS)], dim=1)

    def _of_bin(self, number: int, batch: TrainingBatch, index: int) -> Tensor:
        latents, (frames, height, width) = batch.latents.float(), batch.size
        times, noise = [], []
        for row, one in enumerate(latents):
            generator = noise_generator(self.settings.seed, number, index, stream=f"validation/{row}")
            times.append((index + torch.rand((), generator=generator)) / BINS)
            noise.append(torch.randn(one.shape, generator=generator))
        fixed = {"noise": torch.stack(noise).to(latents), **self._time(torch.stack(times).to(latents))}
        size = {"height": height, "width": width, "num_frames": frames}
        with training_context(self.device, self.settings.dtype):
            return self.scheduler.training_loss(self.model, latents, batch.cond, **size, **fixed)

    def _time(self, times: Tensor) -> dict[str, Tensor]:
        """The argument of `training_loss` for times [B] from 0 (data) to 1 (noise)."""
        if isinstance(self.scheduler, IDDPM):
            return {"timestep": (times * len(self.scheduler.process)).long()}
        return {"time": times}


def report(results: Results) -> dict[str, float]:
    """Mean losses by log name: `validation/loss`, `validation/t0.35`, `validation/240p-17f-1:1/t0.35`, ...

    The number in a name is the middle of its bin, from 0 (data) to 1 (noise).
    """
    everything = {"": torch.cat(list(results.values())), **results} if results else {}
    line = {}
    for bucket, losses in everything.items():
        name = f"validation/{bucket.replace(' ', '-')}".rstrip("/")
        line[name if bucket else f"{name}/loss"] = losses.mean().item()
        for part, loss in enumerate(losses.mean(dim=0).tolist()):
            line[f"{name}/t{(part + 0.5) / BINS:.2f}"] = loss
    return line


class Prompt(NamedTuple):
    """An encoded prompt.

    cond: conditioning of the model for one sample: y, its mask, sizes
    size: (T, H, W) in frames and pixels
    """

    name: str
    cond: Mapping[str, Tensor]
    size: tuple[int, int, int]
    fps: float = 24


class Samples:
    """Generates videos of fixed prompts from fixed noise, with the scheduler's own steps and guidance scale."""

    def __init__(
        self, model: Any, scheduler: Any, vae: Any, settings: TrainSettings, prompts: Sequence[Prompt],
        layout: RankLayout | None = None,
    ) -> None:  # fmt: skip
        self.model, self.scheduler, self.vae, self.settings, self.prompts = model, scheduler, vae, settings, prompts
        self.layout = layout or RankLayout()
        self.device = next(model.parameters()).device

    def due(self, step: int) -> bool:
        """Whether samples are due after `step` steps."""
        return bool(self.settings.sample_every) and step % self.settings.sample_every == 0

    def make(self, ema: EMA | None = None) -> Iterator[tuple[str, np.ndarray, float]]:
        """Name, frames uint8 [T, H, W, 3] and frames per second of each prompt, on the main rank alone.

        All ranks iterate together.
        """
        for number, prompt in enumerate(self.prompts):
            with inference_mode(self.model, ema), training_context(self.device, self.settings.dtype):
                latents = self._latents(number, prompt)
                if not self.layout.is_main:
                    continue
                video = self.vae.decode(latents.to(next(self.vae.parameters()).dtype), num_frames=prompt.size[0])[0]
            yield prompt.name, to_uint8(video.float().nan_to_num()), prompt.fps

    def _latents(self, number: int, prompt: Prompt) -> Tensor:
        """Clean latents [1, C, T', H', W']."""
        seed, (frames, height, width) = self.settings.seed, prompt.size
        shape = (self.vae.out_channels, *self.vae.get_latent_size(prompt.size))
        noise = initial_noise(seed, number, 0, shape)[None].to(self.device)
        cond = {name: value.to(self.device) for name, value in prompt.cond.items()}
        null = {"y": self.model.null_caption(cond["y"])} if self.scheduler.num_branches == 2 else None
        size = {"height": height, "width": width, "num_frames": frames}
        return self.scheduler.sample(self.model, noise, cond, null, **size, source=[noise_generator(seed, number)])


@contextmanager
def inference_mode(model: nn.Module, ema: EMA | None = None) -> Iterator[None]:
    """The model in eval mode without gradients, with the averaged weights if given; restored bit for bit at the end."""
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.callback(_set_training, training)
        model.eval()
        if ema is not None:
            _swap(ema.parameters, ema.averaged)
            stack.callback(_swap, ema.parameters, ema.averaged)
        yield


def _set_training(modules: Iterable[nn.Module]) -> None:
    """Puts these modules, but not those within them, into training mode."""
    for module in modules:
        module.training = True


@torch.no_grad()
def _swap(ones: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Swaps the values of tensors in place, one at a time, without a second copy of all of them."""
    for one, other in zip(ones, others, strict=True):
        assert one.dtype == other.dtype  # or values would be rounded on their way back
        kept = one.detach().clone()
        one.copy_(other)
        other.copy_(kept)
