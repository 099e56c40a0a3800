"""Rendered clips as training data: encoded once, stored, then drawn in batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opensora.acceleration.precision import training_context
from opensora.config.settings import TrainSettings
from opensora.datasets.synthetic.ahead import map_ahead
from opensora.datasets.synthetic.dataset import MixedClips, RenderedClips, to_model
from opensora.errors import ConfigError
from opensora.models.text_encoder.cleaning import preprocess
from opensora.training.data.batch import Encoders, TrainingBatch, clip_conditioning
from opensora.training.data.loader import Read
from opensora.training.feature_extraction.clips import Features, encode_once

ENCODE_BATCH = 20
FPS = 24  # where the data set does not say


class ClipSource:
    """Batches of encoded clips, each of one size; sizes are drawn by their shares as a function of the batch number."""

    def __init__(self, clips: MixedClips, features: list[Features], settings: TrainSettings) -> None:
        self.clips, self.per_epoch, self.settings = clips, clips.period or 1, settings
        self.batches = [
            Batches(encoded, one.batch_size, settings.seed) for one, encoded in zip(clips.sets, features, strict=True)
        ]

    def count(self, epoch: int) -> int:
        return self.per_epoch

    def reader(self, epoch: int, index: int) -> Read:
        return partial(self.read, epoch * self.per_epoch + index)

    def read(self, number: int) -> TrainingBatch:
        """Batch `number` of the run, on the CPU."""
        which = self.clips.pick(number)
        return to_batch(self.clips.sets[which], self.batches[which](number), self.settings, f"batch {number}")


class Batches:
    """Batch n of the endless sequence of shuffled epochs, as a function of n."""

    def __init__(self, features: Features, batch_size: int, seed: int) -> None:
        self.features, self.batch_size, self.seed = features, batch_size, seed
        self.per_epoch = len(features.latents) // batch_size
        if self.per_epoch == 0:
            clips = len(features.latents)
            raise ConfigError(f"{clips} clips do not fill one batch of {batch_size}: there would be no training step")

    def __call__(self, step: int) -> Features:
        epoch, position = divmod(step, self.per_epoch)
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        order = torch.randperm(len(self.features.latents), generator=generator)
        rows = order[position * self.batch_size : (position + 1) * self.batch_size]
        return self.features.rows(rows)


def to_batch(one: RenderedClips, batch: Features, settings: TrainSettings, name: str) -> TrainingBatch:
    """Encoded clips as a batch, on the CPU."""
    size, count = (one.num_frames, *one.image_size), len(batch.latents)
    sizes = clip_conditioning(settings.model["type"], count, size, (settings.dataset or {}).get("fps", FPS))
    cond = {"y": batch.text.float()[:, None], "mask": batch.mask, **sizes}
    names = [f"{one}, {name}, clip {row}" for row in range(count)]
    altered = batch.altered.float() if len(batch.altered) else None
    latents, last = batch.latents.float(), batch.last.float()
    return TrainingBatch(latents, cond, size, names, last, continued=one.continued, altered=altered)


def encode_clips(clips: MixedClips, settings: TrainSettings, encoders: Encoders) -> list[Features]:
    """The latents and text of each set of clips, from the folder `features` of the data set.

    With several sets each has a folder of its own, named after it.
    """
    section: dict[str, Any] = settings.dataset or {}
    folder = Path(section["features"])

    def features(one: RenderedClips) -> Features:
        identity = {
            "clips": one.identity(),
            "vae": encoders.contents["weights of the vae"],
            "text_encoder": encoders.contents["weights of the text encoder"],
            "tokenizer": encoders.contents.get("tokenizer"),
            "model_max_length": encoders.text.model_max_length,
            "dtype": settings.dtype,
            "tensors": [name for name in Features._fields if name != "altered" or _alters(one, settings)],
        }
        where = folder / str(one) if section.get("sizes") or section.get("continued") else folder
        count = one.num_clips or section["num_clips"]
        return encode_once(where, count, identity, partial(_encode, one, encoders, settings))

    return [features(one) for one in clips.sets]


def held_out_clips(clips: MixedClips, settings: TrainSettings, encoders: Encoders) -> list[tuple[str, TrainingBatch]]:
    """Held-out batches with the name of their set: the clips after its last one; none without validation."""
    held = []
    for one in clips.sets if settings.validate_every else ():
        first = one.num_clips or settings.section("dataset")["num_clips"]
        for start in range(0, settings.validation_samples, one.batch_size):
            rows = range(first + start, first + min(start + one.batch_size, settings.validation_samples))
            features = Features(**_encode(one.unlimited(), encoders, settings, rows))
            held.append((str(one), to_batch(one, features, settings, f"held out from {rows.start}")))
    return held


def _encode(one: RenderedClips, encoders: Encoders, settings: TrainSettings, indices: range) -> dict[str, Tensor]:
    """The tensors of Features; texts are as long as the longest may be."""
    made = list(map_ahead(one.clip, indices, settings.num_workers if one.slow else 0))
    videos = [clip.video for clip in made]
    text, mask = encoders.text.encode([preprocess(clip.text) for clip in made])
    room = encoders.text.model_max_length - mask.shape[1]
    encoded = {
        "latents": _latents(videos, encoders, settings),
        "last": _latents([video[-1:] for video in videos], encoders, settings)[:, :, 0],
        "text": nn.functional.pad(text[:, 0].half().cpu(), (0, 0, 0, room)),
        "mask": nn.functional.pad(mask.cpu(), (0, room)),
    }
    if _alters(one, settings):
        encoded["altered"] = _latents([one.altered(index) for index in indices], encoders, settings)
    return encoded


def _alters(one: RenderedClips, settings: TrainSettings) -> bool:
    return settings.input_perturbation > 0 and one.alterable


def _latents(videos: Sequence[np.ndarray], encoders: Encoders, settings: TrainSettings) -> Tensor:
    """Latents [B, C, T', H / 8, W / 8] in float16 of videos uint8 [T, H, W, 3], on the CPU."""
    device = encoders.device
    parts = to_model(videos).to(encoders.dtype).split(ENCODE_BATCH)
    with torch.no_grad(), training_context(device, settings.dtype):
        encoded = [encoders.vae.encode(part.to(device), sample=False).cpu() for part in parts]
    return torch.cat(encoded).half()
