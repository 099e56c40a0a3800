"""Whether a model learns: its loss on clips that are held out, at fixed times and noise, and videos of fixed prompts.

The loss of a training step hangs on the times that it happens to draw. Here every clip is noised to one fixed time in
each of ten parts of the range, so that the same weights always give the same numbers. Nothing is drawn from the
generators of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from opensora.acceleration.device import training_context
from opensora.config.settings import TrainSettings
from opensora.datasets.video import to_uint8
from opensora.distributed.fsdp import Layout, gather
from opensora.pipeline.noise import initial_noise, noise_generator
from opensora.schedulers.iddpm import IDDPM
from opensora.training.data.batch import Examples
from opensora.training.ema import EMA

BINS = 10  # parts of the range of times
Results = dict[str, Tensor]  # of each bucket the losses of its clips, float64 [N, BINS], from data to noise


class Validation:
    """Losses of a model on held-out `batches`, each the name of its bucket and the clips.

    Every rank has all batches, but reads only its share. `scheduler` is one that trains.
    """

    def __init__(
        self, model: nn.Module, scheduler: Any, settings: TrainSettings, batches: Sequence[tuple[str, Examples]],
        layout: Layout | None = None,
    ) -> None:  # fmt: skip
        self.model, self.scheduler, self.settings, self.batches = model, scheduler, settings, batches
        self.layout = layout or Layout()
        self.device = next(model.parameters()).device

    def due(self, step: int) -> bool:
        """Whether the settings ask for it after `step` steps."""
        return bool(self.settings.validate_every) and step % self.settings.validate_every == 0

    def losses(self, ema: EMA | None = None) -> Results:
        """The losses of all clips, by the averaged weights if they are given; on all ranks, which call it together."""
        ranks, rank = self.layout.data_size, self.layout.data_rank
        mine = {}
        with at_rest(self.model, ema):
            for turn in range(-(-len(self.batches) // ranks)):  # a rank without a batch joins in with another one
                number = (turn * ranks + rank) % len(self.batches)
                name, examples = self.batches[number]
                losses = self._of_batch(number, examples.to(self.device)).tolist()
                if examples.weight:  # else nothing of it could be read
                    mine[number] = name, losses
        found = {number: one for part in gather(mine, self.layout) for number, one in part.items()}
        results: dict[str, list[list[float]]] = {}
        for number in sorted(found):
            name, losses = found[number]
            results.setdefault(name, []).extend(losses)
        return {name: torch.tensor(losses, dtype=torch.float64) for name, losses in results.items()}

    def _of_batch(self, number: int, examples: Examples) -> Tensor:
        """The losses [B, BINS] of a batch; what is drawn for a clip depends on its place and the part of the range."""
        return torch.stack([self._of_bin(number, examples, part) for part in range(BINS)], dim=1)

    def _of_bin(self, number: int, examples: Examples, part: int) -> Tensor:
        latents, (frames, height, width) = examples.latents.float(), examples.size
        shares, noise = [], []
        for row, one in enumerate(latents):
            generator = noise_generator(self.settings.seed, number, part, stream=f"validation/{row}")
            shares.append((part + torch.rand((), generator=generator)) / BINS)
            noise.append(torch.randn(one.shape, generator=generator))
        fixed = {"noise": torch.stack(noise).to(latents), **self._times(torch.stack(shares).to(latents))}
        size = {"height": height, "width": width, "num_frames": frames}
        with training_context(self.device, self.settings.dtype):
            return self.scheduler.training_loss(self.model, latents, examples.cond, **size, **fixed)

    def _times(self, shares: Tensor) -> dict[str, Tensor]:
        """The argument of the scheduler's loss that noises to these shares [B] of the range."""
        if isinstance(self.scheduler, IDDPM):
            return {"timestep": (shares * len(self.scheduler.process)).long()}
        return {"time": shares}


def report(results: Results) -> dict[str, float]:
    """The means under names for the log: `validation/loss`, `validation/t0.35`, `validation/240p-17f-1:1/t0.35`, ...

    A number is the middle of its part of the range of times, from 0 (data) to 1 (noise).
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
    """What a video is made of.

    cond: what the model is told, one row each: y, its mask, sizes
    size: (T, H, W) in frames and pixels
    """

    name: str
    cond: Mapping[str, Tensor]
    size: tuple[int, int, int]
    fps: float = 24


class Samples:
    """Videos of fixed prompts from fixed noise, made with the scheduler's own number of steps and guidance."""

    def __init__(
        self, model: Any, scheduler: Any, vae: Any, settings: TrainSettings, prompts: Sequence[Prompt],
        layout: Layout | None = None,
    ) -> None:  # fmt: skip
        self.model, self.scheduler, self.vae, self.settings, self.prompts = model, scheduler, vae, settings, prompts
        self.layout = layout or Layout()
        self.device = next(model.parameters()).device

    def due(self, step: int) -> bool:
        """Whether the settings ask for them after `step` steps."""
        return bool(self.settings.sample_every) and step % self.settings.sample_every == 0

    def make(self, ema: EMA | None = None) -> Iterator[tuple[str, np.ndarray, float]]:
        """For each prompt its name, frames uint8 [T, H, W, 3] and frames per second; none but on the main rank.

        All ranks go through it together.
        """
        for number, prompt in enumerate(self.prompts):
            with at_rest(self.model, ema), training_context(self.device, self.settings.dtype):
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
def at_rest(model: nn.Module, ema: EMA | None = None) -> Iterator[None]:
    """The model as it is used, with the averaged weights if they are given; then as it was, bit for bit."""
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.callback(lambda: [setattr(module, "training", True) for module in training])
        model.eval()
        if ema is not None:
            _swap(ema.parameters, ema.averaged)
            stack.callback(_swap, ema.parameters, ema.averaged)
        yield


@torch.no_grad()
def _swap(ones: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Exchanges the values of tensors in place, so that no second copy of all of them is needed."""
    for one, other in zip(ones, others, strict=True):
        assert one.dtype == other.dtype  # or values would be rounded on their way back
        kept = one.detach().clone()
        one.copy_(other)
        other.copy_(kept)
