"""Callbacks that show whether a run learns: validation on held-out clips, and samples of fixed prompts."""

from __future__ import annotations

from typing import Any, cast

from opensora.config.settings import TrainSettings
from opensora.distributed.process_group import RankLayout
from opensora.models.layers.transformer import PatchTransformer
from opensora.training.data.batch import Encoders, Size, clip_conditioning, encode_texts
from opensora.training.data.diffusion_data import DiffusionData
from opensora.training.data.sources import TableSource
from opensora.training.trainer import Callback, Trainer
from opensora.training.validation import Prompt, Samples, Validation, report

FPS = 24


def make_callbacks(
    settings: TrainSettings, model: PatchTransformer, scheduler: Any, data: DiffusionData, layout: RankLayout
) -> list[Callback]:
    """The callbacks that the settings ask for, as far as the data allows."""
    callbacks: list[Callback] = []
    if settings.validate_every and data.held_out:
        validation = Validation(model, scheduler, settings, data.held_out, layout)
        callbacks.append(lambda trainer: _validate(trainer, validation))
    if settings.sample_every and settings.sample_prompts and data.encoders is not None:
        size = data.sizes[0] if data.sizes else cast(TableSource, data.source).batches(0)[0][1]
        prompts = [_encode_prompt(settings, text, data.encoders, size) for text in settings.sample_prompts]
        samples = Samples(model, scheduler, data.encoders.vae, settings, prompts, layout)
        callbacks.append(lambda trainer: _sample(trainer, samples))
    return callbacks


def _validate(trainer: Trainer, validation: Validation) -> None:
    if validation.due(trainer.step):
        trainer.finish_pending()
        trainer.tracker.step({"step": trainer.step, **report(validation.losses(trainer.ema))})


def _sample(trainer: Trainer, samples: Samples) -> None:
    if samples.due(trainer.step):
        trainer.finish_pending()
        for name, frames, fps in samples.make(trainer.ema):
            trainer.tracker.video(name, frames, fps, trainer.step)


def _encode_prompt(settings: TrainSettings, text: str, encoders: Encoders, size: Size) -> Prompt:
    cond = {**encode_texts(encoders.text, [text]), **clip_conditioning(settings.model["type"], 1, size, FPS)}
    return Prompt(text, cond, size, FPS)
