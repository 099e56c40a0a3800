"""Batches of a table of videos: at one size or in buckets, with some clips held out for validation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from opensora import registry
from opensora.config.settings import TrainSettings
from opensora.datasets.bucket import Bucket, BucketAssignment, Buckets, random_words
from opensora.datasets.datasets import VariableVideoTextDataset, VideoTextDataset, collate
from opensora.datasets.quarantine import UnreadableRow
from opensora.datasets.samplers import SAMPLES, BucketBatchSampler, Epoch, make_epoch, shuffled
from opensora.errors import ConfigError
from opensora.training.data.loader import Read
from opensora.training.data.table_checks import missing_files

logger = logging.getLogger("opensora")
MAX_HELD_OUT = 10  # at most one row in 10 is held out
MAX_NAMES = 8  # buckets in a message
HELD_OUT_STREAM = 5  # of random numbers; other modules number theirs from 0
Key = int | str
Size = tuple[int, int, int]
BatchesOfEpoch = Callable[[int], Sequence[tuple[list[Key], Size]]]


class HeldOutBatch(NamedTuple):
    """A batch of a bucket that is never trained on."""

    name: str
    keys: list[Key]
    size: Size


class TableSource:
    """Batches of a table; `batches(epoch)` lists the keys in `dataset` and the size (T, H, W) of each batch.

    `held_out` batches are for validation; `unreadable` rows are left out because their files do not exist.
    """

    def __init__(
        self, dataset: Any, batches: BatchesOfEpoch, held_out: Sequence[HeldOutBatch] = (),
        unreadable: Sequence[UnreadableRow] = (),
    ) -> None:  # fmt: skip
        self.dataset, self.held_out, self.unreadable = dataset, held_out, unreadable
        self.batches = lru_cache(2)(batches)  # prefetching reaches the next epoch before training does

    def count(self, epoch: int) -> int:
        return len(self.batches(epoch))

    def reader(self, epoch: int, index: int) -> Read:
        keys, size = self.batches(epoch)[index]
        return partial(read_batch, self.dataset.at(epoch), keys, size)


def read_batch(dataset: Any, keys: Sequence[Key], size: Size) -> dict[str, Any]:
    """The readable clips: video uint8 [B, 3, T, H, W], text [B], fps [B] and names [B]; and the `unreadable` ones.

    If none is readable, one black clip of weight 0: all ranks take the same number of steps.
    """
    samples = [dataset[key] for key in keys]
    names = [dataset.name(key) for key, one in zip(keys, samples, strict=True) if not isinstance(one, UnreadableRow)]
    batch = {"weight": 1.0, "names": names, "size": size, **collate(samples)}
    if not names:
        batch |= {"weight": 0.0, "video": torch.zeros(1, 3, *size, dtype=torch.uint8), "fps": torch.ones(1)}
    batch.setdefault("text", [""] * len(batch["video"]))
    return batch


TableDataset = VideoTextDataset | VariableVideoTextDataset


@dataclass(frozen=True)
class FixedSizeBatches(Sequence):
    """Full batches of the rows in `order` [N], all of one size."""

    order: np.ndarray
    batch_size: int
    size: Size

    def __len__(self) -> int:
        return len(self.order) // self.batch_size

    def __getitem__(self, index: int) -> tuple[list[Key], Size]:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.batch_size
        return self.order[first : first + self.batch_size].tolist(), self.size


@dataclass(frozen=True)
class BucketBatches(Sequence):
    """The batches of an epoch in buckets."""

    plan: Epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> tuple[list[Key], Size]:  # type: ignore[override]  # no slices
        bucket, rows = self.plan[index]
        return _keys(bucket, rows), bucket.size


def open_table(settings: TrainSettings) -> TableDataset:
    """The data set of a `dataset` section with a table; frames are uint8. Raises ConfigError."""
    section = settings.section("dataset")
    if section["type"] == "VariableVideoTextDataset":
        if not settings.bucket_config:
            raise ConfigError("training on VariableVideoTextDataset needs a bucket_config")
    else:
        if settings.bucket_config:
            logger.warning("bucket_config has no effect with VideoTextDataset; VariableVideoTextDataset makes buckets")
        if settings.batch_size is None:
            raise ConfigError("training on VideoTextDataset needs a batch_size")
    return registry.build({**section, "seed": settings.seed, "as_uint8": True})


def table_source(
    settings: TrainSettings,
    ranks: int,
    check: Callable[[TableDataset], list[UnreadableRow]] = lambda dataset: missing_files(dataset.table),
) -> TableSource:
    """The batches of a `dataset` section with a table, without the rows that `check` finds broken.

    Raises ConfigError if there would be no step.
    """
    dataset = open_table(settings)
    unreadable = check(dataset)
    rows = np.setdiff1d(np.arange(len(dataset)), np.array([one.row for one in unreadable], np.int64))
    if isinstance(dataset, VariableVideoTextDataset):
        batches, held_out = _in_buckets(settings, dataset, rows, ranks)
    else:
        batches, held_out = _of_one_size(settings, dataset, rows, ranks)
    return TableSource(dataset, batches, held_out, unreadable)


def _of_one_size(
    settings: TrainSettings, dataset: VideoTextDataset, rows: np.ndarray, ranks: int
) -> tuple[BatchesOfEpoch, list[HeldOutBatch]]:
    """The batches of `rows` at one size, and those held out."""
    seed, batch_size, size = settings.seed, settings.batch_size or 1, (dataset.num_frames, *dataset.image_size)
    name, kept = "x".join(map(str, size)), hold_out(settings, rows, len(dataset))
    held_out = [HeldOutBatch(name, part.tolist(), size) for part in _split(kept, batch_size)]
    if settings.validate_every and not held_out:
        _warn_not_validated([(name, len(rows))])
    left = np.setdiff1d(rows, kept)
    if len(left) < batch_size * ranks:
        needed = f"one batch of {batch_size}" + (f" for each of {ranks} ranks" if ranks > 1 else "")
        problem = f"{len(left)} rows of {dataset.table.source} do not fill {needed}"
        raise ConfigError(f"the run would have no steps: {problem}; use smaller batches or more data")
    return lambda epoch: FixedSizeBatches(left[shuffled(len(left), seed, epoch, SAMPLES)], batch_size, size), held_out


def _in_buckets(
    settings: TrainSettings, dataset: VariableVideoTextDataset, rows: np.ndarray, ranks: int
) -> tuple[BatchesOfEpoch, list[HeldOutBatch]]:
    """The batches of `rows` in buckets, and those held out."""
    seed, buckets, (lengths, *sides) = settings.seed, Buckets(settings.bucket_config or {}), dataset.table.sizes()
    interval, num_frames = dataset.frame_interval, np.full(len(lengths), np.nan)  # no bucket takes NaN
    num_frames[rows] = lengths[rows]

    def placed(epoch: int) -> BucketAssignment:
        return buckets.assign(num_frames, *sides, seed=seed, epoch=epoch, frame_interval=interval)

    held_out = []
    if settings.validate_every:
        held_out = list(_hold_out_of_buckets(placed(0), settings))
        num_frames[[_row(key) for one in held_out for key in one.keys]] = np.nan
    sampler = BucketBatchSampler(buckets, num_frames, *sides, seed=seed, frame_interval=interval, world_size=ranks)
    sampler.require_steps()
    _warn_not_trained(sampler.plan)

    def batches(epoch: int) -> BucketBatches:
        first = epoch == 0
        return BucketBatches(
            sampler.plan if first else make_epoch(placed(epoch), seed, epoch, shuffle=True, drop_last=True)
        )

    return batches, held_out


def _hold_out_of_buckets(placement: BucketAssignment, settings: TrainSettings) -> Iterator[HeldOutBatch]:
    """Held-out batches of each bucket; warns of buckets without any."""
    buckets, batch_sizes, rows, group = placement.groups()
    without = []
    for number, bucket in enumerate(buckets):
        own = rows[group == number]
        kept = hold_out(settings, own, len(placement.entry))
        without += [] if len(kept) else [(str(bucket), len(own))]
        for part in _split(kept, int(batch_sizes[number])):
            yield HeldOutBatch(str(bucket), _keys(bucket, part), bucket.size)
    if without:
        _warn_not_validated(without)


def _warn_not_validated(buckets: Sequence[tuple[str, int]]) -> None:
    """Warns of buckets, given by name and number of rows, that have too few rows to hold one out."""
    named = ", ".join(f"{name} ({count} rows)" for name, count in buckets[:MAX_NAMES])
    more = f" and {len(buckets) - MAX_NAMES} more" if len(buckets) > MAX_NAMES else ""
    logger.warning("no validation of %s%s: one clip in %d is held out, and there are fewer", named, more, MAX_HELD_OUT)


def _warn_not_trained(plan: Epoch) -> None:
    """Warns of buckets whose rows do not fill a batch."""
    few = [number for number, count in enumerate(plan.num_batches) if not count]
    named = [f"{plan.buckets[one]} ({plan.num_rows[one]} of {plan.batch_sizes[one]})" for one in few[:MAX_NAMES]]
    more = f" and {len(few) - MAX_NAMES} more" if len(few) > MAX_NAMES else ""
    if few:
        remedy = "use smaller batches there, or give the table more such rows"
        logger.warning("not trained on, with fewer rows than a batch: %s%s; %s", ", ".join(named), more, remedy)


def hold_out(settings: TrainSettings, rows: np.ndarray, total: int) -> np.ndarray:
    """The rows held out for validation: validation_samples of them, at most a tenth; none without validation."""
    count = min(settings.validation_samples, len(rows) // MAX_HELD_OUT) if settings.validate_every else 0
    return np.sort(
        rows[np.argsort(random_words(total, settings.seed, 0, HELD_OUT_STREAM)[rows], kind="stable")[:count]]
    )


def _split(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _keys(bucket: Bucket, rows: np.ndarray) -> list[Key]:
    return ["-".join(map(str, (row, *bucket.size))) for row in rows.tolist()]


def _row(key: Key) -> int:
    return int(str(key).partition("-")[0])
