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
from opensora.config.settings import TrainSettings
from opensora.datasets.bucket import Bucket, BucketAssignment, Buckets, random_words
from opensora.datasets.datasets import VariableVideoTextDataset, VideoTextDataset, collate
from opensora.datasets.quarantine import Broken
from opensora.datasets.samplers import SAMPLES, BucketBatchSampler, Epoch, make_epoch, shuffled
from opensora.errors import ConfigError
from opensora.training.data.loader import Read
from opensora.training.data.table_checks import missing_files

logger = logging.getLogger("opensora")
TENTH = 10  # no more than one in so many rows is held out
MOST_NAMED = 8  # buckets in a message
HELD_OUT = 5  # the stream of random numbers; other modules number theirs from 0
Key = int | str
Size = tuple[int, int, int]
Plan = Callable[[int], Sequence[tuple[list[Key], Size]]]  # epoch -> batches


class Held(NamedTuple):
    """A batch that is never trained on."""

    name: str
    keys: list[Key]
    size: Size


class TableSource:
    """Batches of a table; `batches(epoch)` lists them as keys of `dataset`, and the size (T, H, W) of each.

    `held` are those kept for validation, `broken` the rows that are left out because their files are not there.
    """

    def __init__(self, dataset: Any, batches: Plan, held: Sequence[Held] = (), broken: Sequence[Broken] = ()) -> None:
        self.dataset, self.held, self.broken = dataset, held, broken
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


def open_table(settings: TrainSettings) -> VideoTextDataset | VariableVideoTextDataset:
    """The data set of a `dataset` section with a table, in 8 bits. Raises ConfigError."""
    if settings.dataset["type"] == "VariableVideoTextDataset":
        if not settings.bucket_config:
            raise ConfigError("training on VariableVideoTextDataset needs a bucket_config")
    else:
        if settings.bucket_config:
            logger.warning("bucket_config has no effect with VideoTextDataset; VariableVideoTextDataset makes buckets")
        if settings.batch_size is None:
            raise ConfigError("training on VideoTextDataset needs a batch_size")
    return registry.build({**settings.dataset, "seed": settings.seed, "as_uint8": True})


def table_source(
    settings: TrainSettings,
    ranks: int,
    look: Callable[[VideoTextDataset], list[Broken]] = lambda dataset: missing_files(dataset.table),
) -> TableSource:
    """The batches of a `dataset` section with a table; rows that `look` finds broken are none.

    Raises ConfigError where there would be no step, with why.
    """
    dataset = open_table(settings)
    broken = look(dataset)
    rows = np.setdiff1d(np.arange(len(dataset)), np.array([one.row for one in broken], np.int64))
    make = _bucketed if isinstance(dataset, VariableVideoTextDataset) else _uniform
    return TableSource(dataset, *make(settings, dataset, rows, ranks), broken)


def _uniform(
    settings: TrainSettings, dataset: VideoTextDataset, rows: np.ndarray, ranks: int
) -> tuple[Plan, list[Held]]:
    """The batches of `rows` at one size, and those held out."""
    seed, batch_size, size = settings.seed, settings.batch_size, (dataset.num_frames, *dataset.image_size)
    name, kept = "x".join(map(str, size)), hold_out(settings, rows, len(dataset))
    held = [Held(name, part.tolist(), size) for part in _split(kept, batch_size)]
    if settings.validate_every and not held:
        _say_not_validated([(name, len(rows))])
    left = np.setdiff1d(rows, kept)
    if len(left) < batch_size * ranks:
        needed = f"one batch of {batch_size}" + (f" for each of {ranks} ranks" if ranks > 1 else "")
        problem = f"{len(left)} rows of {dataset.table.source} do not fill {needed}"
        raise ConfigError(f"the run would have no steps: {problem}; take smaller batches or more data")
    return lambda epoch: Chunks(left[shuffled(len(left), seed, epoch, SAMPLES)], batch_size, size), held


def _bucketed(
    settings: TrainSettings, dataset: VariableVideoTextDataset, rows: np.ndarray, ranks: int
) -> tuple[Plan, list[Held]]:
    """The batches of `rows` in buckets, and those held out."""
    seed, buckets, (lengths, *sides) = settings.seed, Buckets(settings.bucket_config), dataset.table.sizes()
    interval, num_frames = dataset.frame_interval, np.full(len(lengths), np.nan)  # no bucket takes what has no length
    num_frames[rows] = lengths[rows]

    def placed(epoch: int) -> BucketAssignment:
        return buckets.assign(num_frames, *sides, seed=seed, epoch=epoch, frame_interval=interval)

    held = []
    if settings.validate_every:
        held = list(_held_of(placed(0), settings))
        num_frames[[_row(key) for one in held for key in one.keys]] = np.nan
    sampler = BucketBatchSampler(buckets, num_frames, *sides, seed=seed, frame_interval=interval, world_size=ranks)
    sampler.require_steps()
    _say_not_trained(sampler.plan)

    def plan(epoch: int) -> Bucketed:
        first = epoch == 0
        return Bucketed(sampler.plan if first else make_epoch(placed(epoch), seed, epoch, shuffle=True, drop_last=True))

    return plan, held


def _held_of(placement: BucketAssignment, settings: TrainSettings) -> Iterator[Held]:
    """Some clips of each bucket, in batches; says which buckets have none."""
    buckets, batch_sizes, rows, group = placement.groups()
    without = []
    for number, bucket in enumerate(buckets):
        own = rows[group == number]
        kept = hold_out(settings, own, len(placement.entry))
        without += [] if len(kept) else [(str(bucket), len(own))]
        for part in _split(kept, int(batch_sizes[number])):
            yield Held(str(bucket), _keys(bucket, part), bucket.size)
    if without:
        _say_not_validated(without)


def _say_not_validated(buckets: Sequence[tuple[str, int]]) -> None:
    """`buckets` are names and numbers of rows."""
    named = ", ".join(f"{name} ({count} rows)" for name, count in buckets[:MOST_NAMED])
    more = f" and {len(buckets) - MOST_NAMED} more" if len(buckets) > MOST_NAMED else ""
    logger.warning("no validation of %s%s: one clip in %d is held out, and there are fewer", named, more, TENTH)


def _say_not_trained(plan: Epoch) -> None:
    """Names the buckets whose rows do not fill a batch."""
    few = [number for number, count in enumerate(plan.num_batches) if not count]
    named = [f"{plan.buckets[one]} ({plan.num_rows[one]} of {plan.batch_sizes[one]})" for one in few[:MOST_NAMED]]
    more = f" and {len(few) - MOST_NAMED} more" if len(few) > MOST_NAMED else ""
    if few:
        remedy = "take smaller batches there, or give the table more such rows"
        logger.warning("not trained on, with fewer rows than a batch: %s%s; %s", ", ".join(named), more, remedy)


def hold_out(settings: TrainSettings, rows: np.ndarray, total: int) -> np.ndarray:
    """The rows kept for validation: validation_samples of them, but no more than a tenth; none without validation."""
    count = min(settings.validation_samples, len(rows) // TENTH) if settings.validate_every else 0
    return np.sort(rows[np.argsort(random_words(total, settings.seed, 0, HELD_OUT)[rows], kind="stable")[:count]])


def _split(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _keys(bucket: Bucket, rows: np.ndarray) -> list[Key]:
    return ["-".join(map(str, (row, *bucket.size))) for row in rows.tolist()]


def _row(key: Key) -> int:
    return int(str(key).partition("-")[0])
