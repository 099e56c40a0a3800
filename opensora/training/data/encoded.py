"""Batches of encoded features, written by `opensora extract`."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from opensora.checkpoints.hub import locate
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.remembered_hash import FileIdentity
from opensora.config.settings import TrainSettings
from opensora.datasets.bucket import Bucket
from opensora.datasets.encoded import EncodedBatchSampler, EncodedDataset, collate_encoded
from opensora.datasets.feature_files import COMMAND, IDENTITY
from opensora.datasets.table import read_table
from opensora.errors import ConfigError, WeightsError
from opensora.training.checkpoint.fingerprint import content_of
from opensora.training.data.batch import TrainingBatch, clip_conditioning
from opensora.training.data.loader import Read
from opensora.training.feature_extraction.shards import LatentShard, TextShard, missing

TYPES = ("EncodedDataset", "BatchFeatureDataset")


def refuse_other_encoders(dataset: EncodedDataset, settings: TrainSettings) -> None:
    """Raises ConfigError if the settings name other encoders, available here, than those of the features."""
    for name in ("vae", "text_encoder"):
        section = getattr(settings, name) or {}
        if not section.get("from_pretrained") or dataset.identity.get(name) is None:
            continue
        try:
            path = locate(section["from_pretrained"], what=name, subfolder=section.get("subfolder"), offline=True)
        except WeightsError:  # they are not needed
            continue
        identity = FileIdentity(path)
        dataset.require(**{name: identity.content_hash(read_state_dict(path))})


class EncodedSource:
    """The batches of a features folder, each of one size. Raises ConfigError if there would be no step."""

    def __init__(self, settings: TrainSettings, ranks: int) -> None:
        folder = settings.section("dataset").get("data_path")
        if not folder:
            raise ConfigError("data_path is not set; give a folder of encoded features with --data-path")
        self.settings, self.dataset = settings, EncodedDataset(folder)
        refuse_stale(self.dataset)
        self._sampler(0, ranks).require_steps()
        self.batches = lru_cache(2)(lambda epoch: list(self._sampler(epoch)))

    def _sampler(self, epoch: int, ranks: int = 1) -> EncodedBatchSampler:
        sizes = self.settings.bucket_config or self.settings.batch_size
        sampler = EncodedBatchSampler(self.dataset, sizes, seed=self.settings.seed, world_size=ranks)
        sampler.set_epoch(epoch)
        return sampler

    def count(self, epoch: int) -> int:
        return len(self.batches(epoch))

    def reader(self, epoch: int, index: int) -> Read:
        return partial(self.read, self.batches(epoch)[index])

    def read(self, items: list[int]) -> TrainingBatch:
        """One batch, on the CPU."""
        batch, size = collate_encoded(self.dataset[item] for item in items), self.size_of(items[0])
        sizes = clip_conditioning(self.settings.model["type"], len(items), size, batch["fps"])
        cond = {"y": batch["text"].float()[:, None], "mask": batch["mask"], **sizes}
        last = batch["last"].float() if "last" in batch else None
        return TrainingBatch(batch["latents"].float(), cond, size, [f"row {row}" for row in batch["id"].tolist()], last)

    def size_of(self, item: int) -> tuple[int, int, int]:
        """(T, H, W) of a sample in frames and pixels."""
        return tuple(self.dataset.sizes[self.dataset.group[item]])

    def model_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of a model that fits the features."""
        sample = self.dataset[0]
        fitting = {"in_channels": sample["latents"].shape[0], "caption_channels": sample["text"].shape[-1]}
        return fitting | ({"input_size": tuple(sample["latents"].shape[1:])} if len(self.dataset.sizes) == 1 else {})

    def contents(self) -> dict[str, str]:
        """What identifies how the features were made and sharded; `data_record` identifies their content."""
        plan = self.dataset.shards.plan.model_dump(exclude={"table"})
        divided = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        return {f"the features' {IDENTITY}": content_of(self.dataset.folder / IDENTITY), "the features' plan": divided}


def refuse_stale(dataset: EncodedDataset) -> None:
    """Raises ConfigError if the encoded table exists and its captions or videos have changed since.

    The features folder names that table, so messages show nothing of its content.
    """
    shards, folder = dataset.shards, dataset.folder
    planned: list[LatentShard | TextShard] = []
    if shards.plan.table is None or not Path(shards.plan.table).is_file():
        return
    try:
        table = read_table(shards.plan.table)
    except ConfigError:  # no longer a table
        return
    for part in shards.plan.latents:
        rows = shards.column(part.file, "planned", np.int64)
        planned.append(LatentShard(part.file, part.crop, Bucket(*part.bucket), part.size, part.batch_size, rows))
    planned += [TextShard(part.file, shards.column(part.file, "row", np.int64)) for part in shards.plan.text]
    missing(folder, planned, table, replace_stale=False, remedy=f"encode them again: {COMMAND} with replace_stale=True")
