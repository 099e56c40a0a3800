"""What shows during a run whether it learns: validation on clips that are held out, and videos of fixed prompts."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from opensora.config.settings import TrainSettings
from opensora.datasets.quarantine import Broken
from opensora.distributed.fsdp import Layout
from opensora.models.text_encoder.cleaning import preprocess
from opensora.training.data.batch import Encoders, Examples, told_of
from opensora.training.data.sources import TableSource, read_batch
from opensora.training.data.table_checks import Gather, alone
from opensora.training.trainer import Trainer, Watch, step_generator
from opensora.training.validation import Prompt, Samples, Validation, report

logger = logging.getLogger("opensora")
Size = tuple[int, int, int]
FPS = 24


def held_out(
    source: TableSource, encoders: Encoders, seed: int, gather: Gather = alone
) -> tuple[list[tuple[str, Examples]], list[Broken]]:
    """The bucket and the clips of each batch that is held out, encoded, in memory; and the files that are broken.

    There are none where no rank can read any of them. Says which buckets are left without a clip.
    """
    host, dataset = torch.empty(0).device, source.dataset.at(0)
    found, broken, own = [], [], set()
    for number, (name, keys, size) in enumerate(source.held):
        batch = read_batch(dataset, keys, size)
        found.append((name, encoders(batch, step_generator(seed, -1, number)).to(host)))
        broken += batch["broken"]
        own |= {name} if batch["names"] else set()
    read = set().union(*gather(own))
    if lost := sorted({one.name for one in source.held} - read):
        logger.warning("no validation of %s: none of the clips held out for it can be read", ", ".join(lost))
    return found if read else [], broken


def watches(
    settings: TrainSettings, model: nn.Module, scheduler: Any, held: list[tuple[str, Examples]], encoders: Encoders,
    size: Size, layout: Layout,
) -> list[Watch]:  # fmt: skip
    """What the settings ask for, to be called after every step."""
    wanted: list[Watch] = []
    if settings.validate_every and held:
        validation = Validation(model, scheduler, settings, held, layout)
        wanted.append(lambda trainer: validation.due(trainer.step) and _validate(trainer, validation))
    if settings.sample_every and settings.sample_prompts:
        prompts = [_prompt(settings, text, encoders, size) for text in settings.sample_prompts]
        samples = Samples(model, scheduler, encoders.vae, settings, prompts, layout)
        wanted.append(lambda trainer: samples.due(trainer.step) and _sample(trainer, samples))
    return wanted


def _validate(trainer: Trainer, validation: Validation) -> None:
    trainer.tracker.step({"step": trainer.step, **report(validation.losses(trainer.ema))})


def _sample(trainer: Trainer, samples: Samples) -> None:
    for name, frames, fps in samples.make(trainer.ema):
        trainer.tracker.video(name, frames, fps, trainer.step)


def _prompt(settings: TrainSettings, text: str, encoders: Encoders, size: Size) -> Prompt:
    y, mask = encoders.text.encode([preprocess(text)])
    cond = {"y": y, **({} if mask is None else {"mask": mask}), **told_of(settings.model["type"], 1, size, FPS)}
    return Prompt(text, cond, size, FPS)
