"""Distributed samplers: the order of samples on each rank, as a function of (seed, epoch).

All ranks share one order; at step `i`, rank `r` of `world_size` gets item `position + i * world_size + r`. The position
in an epoch is therefore one integer, and a run may resume with another number of ranks; only items at the end that do
not fill a step are lost. `world_size` counts data-parallel ranks only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from opensora.datasets.bucket import Bucket, BucketAssignment, Buckets, Column, random_words
from opensora.errors import ConfigError

ROWS, BATCHES, SAMPLES = 1, 2, 3  # ids of random streams


def rank_indices(total: int, position: int, rank: int, world_size: int, drop_last: bool) -> np.ndarray:
    """The indices into an order of `total` items that a rank gets from `position` on; equally many on every rank.

    The remainder is dropped, or completed from the beginning of the order.
    """
    left = max(total - position, 0)
    steps = left // world_size if drop_last else -(-left // world_size)
    return (position + rank + world_size * np.arange(steps)) % max(total, 1)


def shuffled(count: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """A permutation of `range(count)`."""
    return np.argsort(random_words(count, seed, epoch, purpose), kind="stable")


def check_position(position: int, total: int, world_size: int) -> int:
    """Clamps `position` to `total`. Raises ConfigError if it is beyond the last, completed step."""
    if not 0 <= position < total + world_size:
        problem = f"the position {position} is past the {total} items of this epoch"
        raise ConfigError(f"{problem}; the table or its settings are not those of the checkpoint")
    return min(position, total)


@dataclass(frozen=True)
class Epoch:
    """The batches of one epoch in the order that all ranks share.

    placement: the bucket of each row
    buckets, batch_sizes, num_rows: [G], the buckets with rows
    rows: [S], the rows of all batches, concatenated
    start: [M], the offset of each batch in `rows`; group: [M], its bucket
    """

    placement: BucketAssignment
    buckets: list[Bucket]
    batch_sizes: np.ndarray
    num_rows: np.ndarray
    rows: np.ndarray
    start: np.ndarray
    group: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: int) -> tuple[Bucket, np.ndarray]:
        """The bucket of one batch and its rows [B]."""
        group, start = self.group[index], self.start[index]
        return self.buckets[group], self.rows[start : start + self.batch_sizes[group]]

    @property
    def num_batches(self) -> np.ndarray:
        """Batches of each bucket [G]."""
        return np.bincount(self.group, minlength=len(self.buckets))


def make_epoch(placement: BucketAssignment, seed: int, epoch: int, *, shuffle: bool, drop_last: bool) -> Epoch:
    """Groups assigned rows into full batches of one bucket each.

    Rows that do not fill a batch are dropped, or completed with the bucket's first rows. Without `shuffle`, buckets
    are ordered by their first row.
    """
    buckets, batch_sizes, rows, group = placement.groups()
    if shuffle:
        mixed = np.argsort(random_words(len(placement.entry), seed, epoch, ROWS)[rows], kind="stable")
        rows, group = rows[mixed], group[mixed]
    rows = rows[np.argsort(group, kind="stable")]
    num_rows = np.bincount(group, minlength=len(buckets))
    num_batches = num_rows // batch_sizes if drop_last else -(-num_rows // batch_sizes)
    slots = num_batches * batch_sizes
    place = np.arange(slots.sum()) - np.repeat(np.cumsum(slots) - slots, slots)
    first = np.repeat(np.cumsum(num_rows) - num_rows, slots)
    rows = rows[first + place % np.repeat(num_rows, slots)]
    of_batch = np.repeat(np.arange(len(buckets)), num_batches)
    lengths = batch_sizes[of_batch]
    start = np.cumsum(lengths) - lengths
    order = shuffled(len(start), seed, epoch, BATCHES) if shuffle else np.arange(len(start))
    return Epoch(placement, buckets, batch_sizes, num_rows, rows, start[order], of_batch[order])


class _EpochSampler(Sampler):
    """A sampler with a position in an epoch; iterates from the position to the end."""

    epoch: int = 0
    position: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Moves to the beginning of an epoch; keeps the position if the epoch is the current one."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0


class BucketBatchSampler(_EpochSampler):
    """Batches of one bucket each for one rank, as lists of `row-T-H-W`. num_frames, height, width: columns [N]."""

    def __init__(
        self,
        buckets: Buckets,
        num_frames: Column,
        height: Column,
        width: Column,
        *,
        seed: int = 1024,
        frame_interval: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.buckets, self.columns = buckets, (num_frames, height, width)
        self.seed, self.frame_interval, self.shuffle, self.drop_last = seed, frame_interval, shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self._plan: tuple[tuple[int, int], Epoch] | None = None

    @property
    def plan(self) -> Epoch:
        """The whole epoch, independent of the number of ranks."""
        key = (self.seed, self.epoch)
        if self._plan is None or self._plan[0] != key:
            seed, epoch = key
            placed = self.buckets.assign(*self.columns, seed=seed, epoch=epoch, frame_interval=self.frame_interval)
            self._plan = key, make_epoch(placed, seed, epoch, shuffle=self.shuffle, drop_last=self.drop_last)
        return self._plan[1]

    def rank_batches(self, rank: int | None = None) -> np.ndarray:
        """The batches of `plan` for a rank (default: its own), from the position on."""
        total = len(self.plan)
        position = check_position(self.position, total, self.world_size)
        return rank_indices(total, position, self.rank if rank is None else rank, self.world_size, self.drop_last)

    def __iter__(self) -> Iterator[list[str]]:
        plan = self.plan
        for index in self.rank_batches():
            bucket, rows = plan[index]
            size = "-".join(map(str, bucket.size))
            yield [f"{row}-{size}" for row in rows]

    def __len__(self) -> int:
        """The number of steps from the position to the end of the epoch."""
        return len(self.rank_batches())

    def state_dict(self, steps: int = 0) -> dict[str, int]:
        """The position in the data, `steps` steps after the position was last set."""
        position = self.position + steps * self.world_size
        if not self.drop_last:
            position = min(position, len(self.plan))  # items that complete the last step count as used
        return {"seed": self.seed, "epoch": self.epoch, "last_micro_batch_access_index": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved position; the number of ranks may differ."""
        self.seed, self.epoch = state["seed"], state["epoch"]
        self.position = state["last_micro_batch_access_index"]

    def require_steps(self) -> None:
        """Raises ConfigError with the reason if the epoch has no step."""
        plan = self.plan
        if len(rank_indices(len(plan), 0, 0, self.world_size, self.drop_last)):
            return
        if not plan.buckets:
            reason = f"none of the {len(plan.placement.entry)} rows has a bucket"
            remedy = "check the buckets of bucket_config"
        elif not len(plan):
            most = np.argmax(plan.num_rows / plan.batch_sizes)
            reason = f"no bucket has the rows of one batch; the fullest, {plan.buckets[most]}, has"
            reason = f"{reason} {plan.num_rows[most]} of {plan.batch_sizes[most]}"
            remedy = "use smaller batches or more data"
        else:
            reason = f"{len(plan)} batches are fewer than {self.world_size} ranks"
            remedy = "use fewer ranks, smaller batches or more data"
        raise ConfigError(f"the run would have no steps: {reason}; {remedy}")


class SampleSampler(_EpochSampler):
    """Single samples out of `count` for one rank, to be batched afterwards."""

    def __init__(
        self,
        count: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.count, self.seed, self.shuffle, self.drop_last = count, seed, shuffle, drop_last
        self.rank, self.world_size = rank, world_size

    def _rank_samples(self) -> np.ndarray:
        position = check_position(self.position, self.count, self.world_size)
        return rank_indices(self.count, position, self.rank, self.world_size, self.drop_last)

    def __iter__(self) -> Iterator[int]:
        order = shuffled(self.count, self.seed, self.epoch, SAMPLES) if self.shuffle else np.arange(self.count)
        yield from order[self._rank_samples()].tolist()

    def __len__(self) -> int:
        return len(self._rank_samples())

    def state_dict(self, samples: int = 0) -> dict[str, int]:
        """The position after `samples` more samples on each rank (steps times batch size)."""
        position = min(self.position + samples * self.world_size, self.count)
        return {"epoch": self.epoch, "start_index": position // self.world_size, "position": position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores a saved position; a state without `position` must be of the same number of ranks."""
        self.epoch = state.get("epoch", self.epoch)
        self.position = state.get("position", state["start_index"] * self.world_size)


class FeatureBufferSampler(Sampler[int]):
    """Samples file by file, where each file holds `buffer_length` samples, so that each is opened once.

    Every rank gets the same number of files; remaining files are not used.
    """

    def __init__(self, buffer_length: int, num_buffers: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.count = num_buffers // world_size * buffer_length
        self.rank, self.position = rank, 0

    def __iter__(self) -> Iterator[int]:
        yield from range(self.rank * self.count + self.position, (self.rank + 1) * self.count)

    def __len__(self) -> int:
        return self.count - self.position

    def state_dict(self, samples: int = 0) -> dict[str, int]:
        """The position after `samples` more samples."""
        return {"start_index": self.position + samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores a saved position, the first unused sample."""
        self.position = check_position(state["start_index"], self.count, 1)
