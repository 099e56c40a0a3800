"""Features encoded by `opensora extract`, as a data set for training.

    dataset = EncodedDataset(folder)
    sampler = EncodedBatchSampler(dataset, seed=seed, rank=rank, world_size=world_size)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_encoded)

or, for the batch at a position (epoch, index), `encoded_batches(dataset, epoch, seed=seed)[index]`: a list of indices.

A batch has one size. Epoch `e` uses crop `e % num_crops` of every row, in the same batches and order as the bucket
sampler of the table with the same seed, batch sizes and columns, except for unreadable rows. The position is one
integer: `sampler.state_dict(steps)`, `load_state_dict`, `set_epoch`, as in the bucket sampler. `dataset.require(...)`
raises for features of other weights. `TextFeatures(folder)[row]` gives only texts, for videos that are read from files.

The folder holds `features.json` (what was encoded, and how), `plan.json` (the list of shards), and the shards:

    latents/crop0/240p_51f_0.56/ROW-ROW.safetensors   latents [M, C, T, h, w], last [M, C, h, w], row [M], fps [M]
    text/ROW.safetensors                              text [sum of L, C], length [N], row [N]

Shards are memory-mapped; only the requested samples are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from opensora.datasets.bucket import Bucket, Buckets
from opensora.datasets.feature_files import COMMAND, Shards, caption_key
from opensora.datasets.samplers import BucketBatchSampler, Epoch, make_epoch
from opensora.errors import ConfigError


class TextFeatures:
    """Text features by table row: (features [L, C], mask [L] of ones), without padding. `rows` lists all rows."""

    def __init__(self, folder: str | Path, shards: Shards | None = None) -> None:
        self.shards = shards or Shards(folder)
        self._names = [part.file for part in self.shards.plan.text]
        if not self._names:
            problem = "holds no text features (save_text_features was off)"
            raise ConfigError(f"{folder} {problem}; set load_text_features=False, or encode the texts too")
        heads = [(number, *self._head(name)) for number, name in enumerate(self._names)]
        self.rows = np.concatenate([rows for _, rows, _ in heads])
        self._shard = np.concatenate([np.full(len(rows), number, np.int32) for number, rows, _ in heads])
        self._stop = np.concatenate([np.cumsum(lengths) for _, _, lengths in heads])
        self._length = np.concatenate([lengths for _, _, lengths in heads])

    def _head(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self.shards.column(name, "row", np.int64), self.shards.column(name, "length", np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row:
            raise ConfigError(f"{self.shards.folder}: has no text of row {row}; run {COMMAND} again with this table")
        stop, length = int(self._stop[place]), int(self._length[place])
        text = self.shards[self._names[self._shard[place]]].get_slice("text")[stop - length : stop].clone()
        return text, torch.ones(length, dtype=torch.int64)

    def check(self, captions: Sequence[str]) -> None:
        """Raises ConfigError if the captions of a table differ from the encoded ones."""
        for name in self._names:
            rows, keys = self.shards.column(name, "row", np.int64), self.shards.column(name, "key", np.uint8)
            for row, key in zip(rows, keys, strict=True):
                if row >= len(captions) or not np.array_equal(caption_key(captions[row]), key):
                    problem = f"the caption of row {row} is not the one that was encoded"
                    raise ConfigError(f"{self.shards.folder}: {problem}; run {COMMAND} with replace_stale=True")


class EncodedDataset(Dataset):
    """Encoded clips: `latents` [C, T', h, w], `last` [C, h, w], `text` [L, C], `mask` [L], and size conditioning.

    The latter is `num_frames`, `height`, `width` in frames and pixels, `ar` (height / width), `fps`. `id` is the table
    row; `last` is the last frame encoded as an image, if stored. `sizes` are the (T, H, W) of all groups, `group` [N]
    the group, `crop` and `row` [N] the origin of each sample. `with_text=False` omits texts. Raises ConfigError for an
    incomplete folder.
    """

    def __init__(self, folder: str | Path, with_text: bool = True) -> None:
        self.shards = Shards(folder)
        self.folder, self.identity, self.require = self.shards.folder, self.shards.identity, self.shards.require
        parts = self.shards.plan.latents
        if not parts:
            raise ConfigError(f"{folder} holds no video features; set load_video_features=False, or encode them too")
        self.num_rows, self.num_crops = self.shards.plan.num_rows, self.shards.plan.num_crops
        self._names = [part.file for part in parts]
        keys = [(part.bucket, part.size, part.batch_size) for part in parts]
        groups = list(dict.fromkeys(keys))
        self.buckets = [Bucket(*bucket) for bucket, _, _ in groups]
        self.sizes = [size for _, size, _ in groups]
        self.batch_sizes = [batch_size for _, _, batch_size in groups]
        self.row, self.fps = (
            np.concatenate([self.shards.column(name, key, kind) for name in self._names])
            for key, kind in (("row", np.int64), ("fps", np.float32))
        )
        counts = [len(self.shards.column(name, "row", np.int64)) for name in self._names]
        if len(self.row) != len(self.fps):
            raise ConfigError(f"{folder}: is damaged (not as many rows as frame rates); run {COMMAND} again")
        self.crop = np.repeat([part.crop for part in parts], counts)
        self.group = np.repeat([groups.index(key) for key in keys], counts)
        self._shard = np.repeat(np.arange(len(parts)), counts)
        self._place = np.concatenate([np.arange(count) for count in counts])
        self.texts = TextFeatures(folder, self.shards) if with_text else None

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, place = self.shards[self._names[self._shard[index]]], int(self._place[index])
        latents = shard.get_slice("latents")[place].clone()  # not a view of the whole file
        num_frames, height, width = self.sizes[self.group[index]]
        sample: dict[str, Any] = {"latents": latents}
        if num_frames == 1:
            sample["last"] = latents[:, -1].clone()
        elif "last" in shard.keys():  # noqa: SIM118 (a file, no dict)
            sample["last"] = shard.get_slice("last")[place].clone()
        if self.texts is not None:
            sample["text"], sample["mask"] = self.texts[int(self.row[index])]
        conditioning = {"num_frames": num_frames, "height": height, "width": width, "ar": height / width}
        return {**sample, **conditioning, "fps": float(self.fps[index]), "id": int(self.row[index])}


def collate_encoded(samples: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """Batches samples of one size: tensors stacked, numbers as tensors [B], text zero-padded to the longest.

    `text` is [B, L, C] and `mask` [B, L], 1 for a real token.
    """
    samples, batch = list(samples), {}
    for name, value in samples[0].items():
        values = [sample[name] for sample in samples]
        if name in ("text", "mask"):
            batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        else:
            batch[name] = torch.stack(values) if isinstance(value, Tensor) else torch.tensor(values)
    return batch


@dataclass(frozen=True)
class _CropAssignment:
    """The encoded rows of one crop, as `make_epoch` takes them; `entry` [table rows] is -1 for a missing row."""

    entry: np.ndarray
    buckets: Sequence[Bucket]
    batch_sizes: Sequence[int]

    def groups(self) -> tuple[list[Bucket], np.ndarray, np.ndarray, np.ndarray]:
        """As `BucketAssignment.groups`."""
        rows = np.flatnonzero(self.entry >= 0)
        found, first, group = np.unique(self.entry[rows], return_index=True, return_inverse=True)
        order = np.argsort(first)
        buckets = [self.buckets[number] for number in found[order]]
        return buckets, np.array(self.batch_sizes, np.int64)[found[order]], rows, np.argsort(order)[group]


class EncodedBatches(Sequence[list[int]]):
    """The batches of one epoch as indices into the data set; `plan` holds them as table rows."""

    def __init__(self, plan: Epoch, item_of: np.ndarray) -> None:
        self.plan, self._item_of = plan, item_of

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]  # no slices
        return self._item_of[self.plan[index][1]].tolist()


def encoded_batches(
    dataset: EncodedDataset, epoch: int, *, seed: int = 1024, batch_size: int | Mapping[str, Any] | None = None,
    shuffle: bool = True, drop_last: bool = True, without: Sequence[int] = (),
) -> EncodedBatches:  # fmt: skip
    """The batches of an epoch in the order that all ranks share, a function of (seed, epoch).

    `batch_size` is a number for all sizes, a bucket_config, or None for the batch sizes of the extraction. Table rows
    in `without` are left out.
    """
    items = np.flatnonzero(dataset.crop == epoch % dataset.num_crops)
    entry, item_of = np.full(dataset.num_rows, -1, np.int64), np.zeros(dataset.num_rows, np.int64)
    entry[dataset.row[items]], item_of[dataset.row[items]] = dataset.group[items], items
    entry[np.asarray(without, np.int64)] = -1
    placed = _CropAssignment(entry, dataset.buckets, _batch_sizes(dataset, batch_size))
    # It takes any rows with `entry` and `groups`.
    plan = make_epoch(placed, seed, epoch, shuffle=shuffle, drop_last=drop_last)  # type: ignore[arg-type]
    return EncodedBatches(plan, item_of)


class EncodedBatchSampler(BucketBatchSampler):
    """`encoded_batches` for one rank, with an integer position in the epoch."""

    def __init__(
        self, dataset: EncodedDataset, batch_size: int | Mapping[str, Any] | None = None, *, seed: int = 1024,
        shuffle: bool = True, drop_last: bool = True, rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        self.dataset, self.batch_size = dataset, batch_size
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self._batches: tuple[tuple[int, int], EncodedBatches] | None = None

    @property
    def batches(self) -> EncodedBatches:
        """The batches of the whole epoch."""
        key = (self.seed, self.epoch)
        if self._batches is None or self._batches[0] != key:
            how: dict[str, Any] = {"seed": self.seed, "shuffle": self.shuffle, "drop_last": self.drop_last}
            self._batches = key, encoded_batches(self.dataset, self.epoch, batch_size=self.batch_size, **how)
        return self._batches[1]

    @property
    def plan(self) -> Epoch:
        """The whole epoch as table rows, independent of the number of ranks."""
        return self.batches.plan

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]  # items of shards, not keys of rows
        batches = self.batches
        for index in self.rank_batches().tolist():
            yield batches[index]


def _batch_sizes(dataset: EncodedDataset, batch_size: int | Mapping[str, Any] | None) -> list[int]:
    """The batch size of each group."""
    if batch_size is None:
        return dataset.batch_sizes
    if isinstance(batch_size, int):
        return [batch_size] * len(dataset.sizes)
    entries = {(entry.resolution, entry.num_frames): entry.batch_size for entry in Buckets(dict(batch_size)).entries}
    sizes = []
    for bucket in dataset.buckets:
        if not (size := entries.get(bucket[:2])):
            problem = f"has features of {bucket}, and bucket_config no batch size for them"
            raise ConfigError(f"{dataset.folder} {problem}; add it, or encode into another folder")
        sizes.append(size)
    return sizes
