"""Training on latents and texts that `scripts/misc/extract_feat.py` encoded."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

from opensora.datasets.encoded import IDENTITY, PLAN, EncodedBatchSampler, EncodedDataset, collate_encoded
from opensora.errors import ConfigError
from opensora.settings import TrainSettings
from opensora.training.data import Read
from opensora.training.examples import Examples, told_of
from opensora.training.fingerprint import content_of

TYPES = ("EncodedDataset", "BatchFeatureDataset")


class EncodedSource:
    """The batches of a folder of features, each of one size. Raises ConfigError where there would be no step."""

    def __init__(self, settings: TrainSettings, ranks: int) -> None:
        folder = settings.dataset.get("data_path")
        if not folder:
            raise ConfigError("data_path is not set; give a folder of encoded features with --data-path")
        self.settings, self.dataset = settings, EncodedDataset(folder)
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

    def read(self, items: list[int]) -> Examples:
        """The examples of one batch, on the CPU."""
        batch, size = collate_encoded(self.dataset[item] for item in items), self.size_of(items[0])
        told = told_of(self.settings.model["type"], len(items), size, batch["fps"])
        cond = {"y": batch["text"].float()[:, None], "mask": batch["mask"], **told}
        last = batch["last"].float() if "last" in batch else None
        return Examples(batch["latents"].float(), cond, size, [f"row {row}" for row in batch["id"].tolist()], last)

    def size_of(self, item: int) -> tuple[int, int, int]:
        """(T, H, W) of a sample in frames and pixels."""
        return tuple(self.dataset.sizes[self.dataset.group[item]])

    def keywords(self) -> dict[str, Any]:
        """Of a model that fits the features."""
        sample = self.dataset[0]
        fitting = {"in_channels": sample["latents"].shape[0], "caption_channels": sample["text"].shape[-1]}
        return fitting | ({"input_size": tuple(sample["latents"].shape[1:])} if len(self.dataset.sizes) == 1 else {})

    def contents(self) -> dict[str, str]:
        """What identifies the features."""
        return {f"the features' {name}": content_of(self.dataset.folder / name) for name in (IDENTITY, PLAN)}
