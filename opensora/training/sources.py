"""Where the batches of a diffusion model come from: tables of videos, or clips that are encoded already."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from opensora import registry
from opensora.datasets.bucket import Bucket, Buckets, Placement, random_words
from opensora.datasets.datasets import Broken, VariableVideoTextDataset, VideoTextDataset, collate
from opensora.datasets.samplers import SAMPLES, BucketBatchSampler, Epoch, lay_out, shuffled
from opensora.errors import ConfigError
from opensora.settings import TrainSettings
from opensora.training.data import Read

logger = logging.getLogger("opensora")
HELD_OUT = 5  # the stream of random numbers; other modules number theirs from 0
Key = int | str
Size = tuple[int, int, int]


class Held(NamedTuple):
    """A batch that is never trained on."""

    name: str
    keys: list[Key]
    size: Size


class TableSource:
    """Batches of a table; `batches(epoch)` lists them as keys of `dataset`, and the size (T, H, W) of each.

    `held` are those kept for validation.
    """

    def __init__(
        self, dataset: Any, batches: Callable[[int], Sequence[tuple[list[Key], Size]]], held: Sequence[Held] = ()
    ) -> None:
        self.dataset, self.held = dataset, held
        self.batches = lru_cache(2)(batches)  # reading ahead comes to the next epoch before training does

    def count(self, epoch: int) -> int:
        return len(self.batches(epoch))

    def reader(self, epoch: int, index: int) -> Read:
        keys, size = self.batches(epoch)[index]
        return partial(read_batch, self.dataset.at(epoch), keys, size)


def read_batch(dataset: Any, keys: Sequence[Key], size: Size) -> dict[str, Any]:
    """The clips that can be read: video uint8 [B, 3, T, H, W], text [B], fps [B] and names [B]; and the `broken` ones.

    Where none can be read there is one black clip, of weight 0: all ranks have to take the same number of steps.
    """
    samples = [dataset[key] for key in keys]
    names = [dataset.name(key) for key, one in zip(keys, samples, strict=True) if not isinstance(one, Broken)]
    batch = {"weight": 1.0, "names": names, "size": size, **collate(samples)}
    if not names:
        batch |= {"weight": 0.0, "video": torch.zeros(1, 3, *size, dtype=torch.uint8), "fps": torch.ones(1)}
    batch.setdefault("text", [""] * len(batch["video"]))
    return batch


@dataclass(frozen=True)
class Chunks(Sequence):
    """An order of rows [N] in whole batches."""

    order: np.ndarray
    batch_size: int
    size: Size

    def __len__(self) -> int:
        return len(self.order) // self.batch_size

    def __getitem__(self, index: int) -> tuple[list[Key], Size]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.batch_size
        return self.order[first : first + self.batch_size].tolist(), self.size


@dataclass(frozen=True)
class Bucketed(Sequence):
    """The batches of a bucket plan."""

    plan: Epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> tuple[list[Key], Size]:
        bucket, rows = self.plan[index]
        return _keys(bucket, rows), bucket.size


def table_source(settings: TrainSettings, ranks: int) -> TableSource:
    """The batches of a `dataset` section with a table. Raises ConfigError where there would be no step, with why."""
    section = {**settings.dataset, "seed": settings.seed, "as_uint8": True}
    if section["type"] == "VariableVideoTextDataset":
        return _bucketed(settings, registry.build(section), ranks)
    if settings.bucket_config:
        logger.warning("bucket_config has no effect with VideoTextDataset; VariableVideoTextDataset makes buckets")
    if settings.batch_size is None:
        raise ConfigError("training on VideoTextDataset needs a batch_size")
    return _uniform(settings, registry.build(section), ranks)


def _uniform(settings: TrainSettings, dataset: VideoTextDataset, ranks: int) -> TableSource:
    seed, batch_size, size = settings.seed, settings.batch_size, (dataset.num_frames, *dataset.image_size)
    kept = hold_out(settings, np.arange(len(dataset)), len(dataset))
    name = "x".join(map(str, size))
    held = [Held(name, rows.tolist(), size) for rows in _split(kept, batch_size)]
    left = np.setdiff1d(np.arange(len(dataset)), kept)
    if len(left) < batch_size * ranks:
        needed = f"one batch of {batch_size}" + (f" for each of {ranks} ranks" if ranks > 1 else "")
        problem = f"{len(left)} rows of {dataset.table.source} do not fill {needed}"
        raise ConfigError(f"the run would have no steps: {problem}; take smaller batches or more data")
    return TableSource(
        dataset, lambda epoch: Chunks(left[shuffled(len(left), seed, epoch, SAMPLES)], batch_size, size), held
    )


def _bucketed(settings: TrainSettings, dataset: VariableVideoTextDataset, ranks: int) -> TableSource:
    if not settings.bucket_config:
        raise ConfigError("training on VariableVideoTextDataset needs a bucket_config")
    seed, buckets, (num_frames, *sides) = settings.seed, Buckets(settings.bucket_config), dataset.table.sizes()
    interval = dataset.frame_interval

    def placed(epoch: int) -> Placement:
        return buckets.place(num_frames, *sides, seed=seed, epoch=epoch, frame_interval=interval)

    held = []
    if settings.validate_every:
        held = list(_held_of(placed(0), settings))
        num_frames = num_frames.copy()
        num_frames[[_row(key) for one in held for key in one.keys]] = np.nan  # no bucket takes what has no length
    sampler = BucketBatchSampler(buckets, num_frames, *sides, seed=seed, frame_interval=interval, world_size=ranks)
    sampler.require_steps()

    def plan(epoch: int) -> Bucketed:
        first = epoch == 0
        return Bucketed(sampler.plan if first else lay_out(placed(epoch), seed, epoch, shuffle=True, drop_last=True))

    return TableSource(dataset, plan, held)


def _held_of(placement: Placement, settings: TrainSettings) -> Iterator[Held]:
    """Some clips of each bucket, in batches."""
    buckets, batch_sizes, rows, group = placement.groups()
    for number, bucket in enumerate(buckets):
        kept = hold_out(settings, rows[group == number], len(placement.entry))
        for part in _split(kept, int(batch_sizes[number])):
            yield Held(str(bucket), _keys(bucket, part), bucket.size)


def hold_out(settings: TrainSettings, rows: np.ndarray, total: int) -> np.ndarray:
    """The rows kept for validation: validation_samples of them, but no more than a tenth; none without validation."""
    count = min(settings.validation_samples, len(rows) // 10) if settings.validate_every else 0
    return np.sort(rows[np.argsort(random_words(total, settings.seed, 0, HELD_OUT)[rows], kind="stable")[:count]])


def _split(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _keys(bucket: Bucket, rows: np.ndarray) -> list[Key]:
    return ["-".join(map(str, (row, *bucket.size))) for row in rows.tolist()]


def _row(key: Key) -> int:
    return int(str(key).partition("-")[0])
