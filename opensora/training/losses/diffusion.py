"""The loss of a diffusion model: the scheduler's, with text dropout and given frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opensora.models.layers.transformer import PatchTransformer
from opensora.schedulers.common import upload
from opensora.training.data.batch import TrainingBatch
from opensora.training.losses.perturbation import InputPerturbation
from opensora.training.masks import MaskRatios

FIRST_HALF = MaskRatios({"half_head": 1.0})


class DiffusionLoss:
    """The scheduler's loss of each sample of a batch, [B], times the weight of the batch.

    Drops text with the model's `class_dropout_prob`. `ratios` draws which frames are given, unless the clips of the
    batch continue from their first half. `input_perturbation` is the share of samples that move towards `altered`.
    """

    def __init__(
        self, model: PatchTransformer, scheduler: Any, ratios: MaskRatios | None, input_perturbation: float = 0.0
    ) -> None:
        self.model, self.scheduler, self.ratios = model, scheduler, ratios
        self.input_perturbation = input_perturbation

    def __call__(self, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        latents, y = batch.latents, drop_text(self.model, batch.cond["y"], generator)
        mask, ratios = None, FIRST_HALF if batch.continued else self.ratios
        if ratios is not None:
            mask = upload(ratios.draw(len(latents), latents.shape[2], generator), latents)
            latents = latents if batch.last is None else end_in_image(latents, batch.last, mask)
        frames, height, width = batch.size
        size = {"height": height, "width": width, "num_frames": frames}
        cond, how = {**batch.cond, "y": y}, {}
        if self.input_perturbation and batch.altered is not None:
            how["perturb"] = InputPerturbation(batch.latents, batch.altered, self.input_perturbation, generator)
        losses = self.scheduler.training_loss(self.model, latents, cond, **size, mask=mask, generator=generator, **how)
        return losses * batch.weight


def draw_dropped_texts(probability: float, count: int, generator: torch.Generator) -> Tensor:
    """bool [count]: the samples that are trained without their text. The first random numbers of a batch."""
    return torch.rand(count, generator=generator) < probability


def drop_text(model: PatchTransformer, y: Tensor, generator: torch.Generator) -> Tensor:
    """`y` [B, ...] with some rows replaced by the unconditional text, for classifier-free guidance."""
    drop = draw_dropped_texts(model.class_dropout_prob, len(y), generator)
    if not drop.any():
        return y
    return torch.where(upload(drop, y).view(-1, *(1,) * (y.ndim - 1)), model.null_caption(y), y)


def end_in_image(latents: Tensor, last: Tensor, mask: Tensor) -> Tensor:
    """Replaces the last frame of `latents` [B, C, T, H, W] by `last` [B, C, H, W] where `mask` [B, T] gives it alone.

    At inference a given last frame is encoded as an image, and its latents differ from those of the end of a video.
    """
    if mask.shape[1] == 1:
        return latents
    alone = ~mask[:, -1] & mask[:, -2]
    end = torch.where(alone[:, None, None, None], last, latents[:, :, -1])
    return torch.cat((latents[:, :, :-1], end[:, :, None]), dim=2)
