"""The clips of training steps, through training's own data set, buckets, loader and random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from opensora import registry
from opensora.checkpoints import builder
from opensora.config.settings import TrainSettings
from opensora.errors import ConfigError, MediaError, WeightsError
from opensora.training.data.loader import DataPosition, PrefetchLoader
from opensora.training.data.sources import TableSource, table_source
from opensora.training.data.table_checks import check_texts, missing_files
from opensora.training.diffusion import check_training
from opensora.training.losses.diffusion import draw_dropped_texts
from opensora.training.preview.captions import CaptionReader, ShownCaption
from opensora.training.step import step_generator


class ShownClip(NamedTuple):
    """A clip of a step.

    frames: uint8 [3, T, H, W] as the autoencoder is given them
    given: for each of the T frames, whether the model is given its latent frame instead of generating it
    without_text: whether the step drops the caption, for classifier-free guidance
    """

    name: str
    step: int
    frames: Tensor
    fps: float
    caption: ShownCaption
    given: list[bool]
    without_text: bool


def training_clips(settings: TrainSettings, step: int = 0) -> Iterator[ShownClip]:
    """The clips of a run on one rank from a step on, as if no step before it had been bad.

    Raises ConfigError for settings without a table of videos and as training does, MediaError if no clip of an epoch
    can be read.
    """
    section = settings.dataset or {}
    if section.get("type") not in registry.DATASETS:
        raise ConfigError("the configuration trains on no table of videos; name one whose dataset is VideoTextDataset")
    _, ratios = check_training(settings)
    source = table_source(settings, 1, _checked)
    captions, vae, drop = CaptionReader(settings), _autoencoder(settings), _drop_probability(settings)
    loader = PrefetchLoader(source)
    loader.go_to(_position(source, step * settings.accumulation_steps))
    without = 0
    while True:
        batches = [next(loader) for _ in range(settings.accumulation_steps)]
        if not any(batch["names"] for batch in batches):
            without += len(batches)
            if without > source.count(loader.position.epoch):
                raise MediaError(
                    f"{source.dataset.table.source}: no clip of a whole epoch can be read; check its files"
                )
            continue
        without = 0
        for part, batch in enumerate(batches):
            generator, count = step_generator(settings.seed, step, part), len(batch["video"])
            dropped = draw_dropped_texts(drop, count, generator)
            latents = vae.get_latent_size(batch["size"])[0]
            mask = None if ratios is None else ratios.draw(count, latents, generator)
            latent_of = latent_frames(vae, batch["size"][0])
            for n, name in enumerate(batch["names"]):
                given = [False] * len(latent_of) if mask is None else [not mask[n, index] for index in latent_of]
                yield ShownClip(
                    name, step, batch["video"][n], float(batch["fps"][n]), captions(batch["text"][n]), given,
                    bool(dropped[n]),
                )  # fmt: skip
        step += 1


def latent_frames(vae: Any, frames: int) -> list[int]:
    """The index of the latent frame of each of `frames` frames.

    A chunk of the autoencoder is padded at its start, so that latent frames end where the chunk ends.
    """
    chunk = getattr(vae, "micro_frame_size", None) or frames
    found: list[int] = []
    for begin in range(0, frames, chunk):
        length = min(chunk, frames - begin)
        before, inside = (vae.get_latent_size((count, 8, 8))[0] for count in (begin, length))
        found += [before + inside - vae.get_latent_size((length - frame, 8, 8))[0] for frame in range(length)]
    return found


def _checked(dataset: Any) -> Any:
    check_texts(dataset.table, dataset.captions)
    return missing_files(dataset.table)


def _position(source: TableSource, batches: int) -> DataPosition:
    """The position after so many batches."""
    epoch = 0
    while batches >= source.count(epoch):
        batches -= source.count(epoch)
        epoch += 1
    return DataPosition(epoch, batches)


def _autoencoder(settings: TrainSettings) -> Any:
    """The autoencoder on the meta device: its sizes only."""
    section = settings.section("vae")
    return builder.build_model(section, _config(section, "vae"))


def _drop_probability(settings: TrainSettings) -> float:
    """The model's `class_dropout_prob`: of the configuration, of the checkpoint, or the usual one."""
    section, name = settings.model, "class_dropout_prob"
    path = _config(section, "model") if section.get("from_pretrained") else None
    stated = builder.stated_keywords(section["type"], path, {name}) if path else {}
    return float({**stated, **section}.get(name, 0.1))


def _config(section: dict[str, Any], what: str) -> Any:
    """The local checkpoint of a section, None if it is not on this machine."""
    try:
        return builder.find_weights(section, what, offline=True)
    except WeightsError:
        return None
