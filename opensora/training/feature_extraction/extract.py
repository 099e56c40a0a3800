"""Encodes the latents and texts of a table of videos once, so that training needs no encoders.

Crop `c` of a row is what epoch `c` of a training run with the same seed would see: the same bucket, the same frames.
Under torchrun the shards are divided over the ranks, which do not communicate. `opensora/datasets/encoded.py` describes
the files, and how training reads them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opensora import registry
from opensora.acceleration.device import pick_device, set_device
from opensora.acceleration.precision import DTYPES, inference_dtype
from opensora.checkpoints import builder
from opensora.config.sections import check_type
from opensora.config.settings import ExtractSettings
from opensora.datasets.bucket import Buckets
from opensora.datasets.datasets import VariableVideoTextDataset, VideoTextDataset
from opensora.datasets.feature_files import PLAN
from opensora.datasets.quarantine import Quarantine
from opensora.distributed.ranks import ranks
from opensora.errors import ConfigError
from opensora.training.data.table_checks import check_texts, missing_files
from opensora.training.feature_extraction.encode_shards import LatentEncoder, encode_texts
from opensora.training.feature_extraction.identity import claim_folder
from opensora.training.feature_extraction.shard_writer import ShardWriter
from opensora.training.feature_extraction.shards import (
    Group,
    LatentShard,
    TextShard,
    bucket_groups,
    fixed_group,
    latent_shards,
    missing,
    text_shards,
)

FORMAT = 1  # of the files, and of how videos and captions are prepared
SHARD_BYTES = 2**28  # of latents, at most


def extract(settings: ExtractSettings) -> Path:
    """Encodes the missing shards; returns the features folder. Raises ConfigError, WeightsError or MediaError."""
    return Extraction(settings).run()


class Extraction:
    """One rank's share of the shards; the rank is that of the environment, as torchrun sets it."""

    def __init__(self, settings: ExtractSettings) -> None:
        self.settings, self.folder = settings, Path(settings.save_dir)
        self.rank, self.world_size, _ = ranks()
        self.dataset = make_dataset(settings)
        self.table = self.dataset.table
        if settings.save_text_features and self.table.text is None:
            problem = "has no column text, which text features need"
            raise ConfigError(f"{self.table.source}: {problem}; add it, or set save_text_features=False")
        self.rows = np.arange(len(self.table))[settings.start_index : settings.end_index]
        if settings.save_text_features:
            check_texts(self.table, self.dataset.captions, self.rows)
        if settings.save_video_features:
            missing_files(self.table, rows=self.rows)
        self.device = _own_device(settings.device)
        self.dtype = inference_dtype(self.device, settings.dtype)
        self.writer = ShardWriter(self.folder, DTYPES[settings.save_dtype], settings.save_dtype)
        self.tokenizer: dict[str, str] = {}  # its hash, if texts are encoded
        self.vae, vae_hash = self._load("vae", settings.save_video_features)
        self.text_encoder, text_hash = self._load("text_encoder", settings.save_text_features)
        self.identity = {**self._identity(), "vae": vae_hash, "text_encoder": text_hash}
        self.identity |= self.tokenizer

    def run(self) -> Path:
        """Encodes this rank's share of the missing shards."""
        latents, texts = self.plan()
        claim_folder(self.folder, self.identity, write=self.rank == 0)
        if self.rank == 0:
            self._write_plan(latents, texts)
        share = slice(self.rank, None, self.world_size)
        absent = [
            missing(self.folder, part[share], self.table, self.settings.replace_stale) for part in (texts, latents)
        ]
        encode_texts(absent[0], self.table, self.text_encoder, self.writer, show_progress=self.rank == 0)
        self.text_encoder = None  # frees memory on the device
        self._encode_latents(absent[1])
        return self.folder

    def plan(self) -> tuple[list[LatentShard], list[TextShard]]:
        """All shards of all ranks, missing or not."""
        settings, rows, latents = self.settings, self.rows, []
        if not len(rows):
            raise ConfigError(f"{self.table.source}: no rows from {settings.start_index} on, end_index excluded")
        used = np.empty(0, np.int64)
        for crop in range(settings.crops):
            groups, possible = self._groups(rows, crop)
            used = np.union1d(used, possible)
            latents += latent_shards(groups, crop, self._max_samples) if self.vae else []
        if not len(used) or (self.vae and not latents):
            problem = f"none of the {len(rows)} rows has a bucket"
            raise ConfigError(f"{self.table.source}: {problem}; check them with `opensora buckets`")
        return latents, text_shards(used, settings.bin_size) if self.text_encoder else []

    def _groups(self, rows: np.ndarray, crop: int) -> tuple[list[Group], np.ndarray]:
        settings = self.settings
        if settings.bucket_config is None:
            assert isinstance(self.dataset, VideoTextDataset)
            size = (self.dataset.num_frames, *self.dataset.image_size)
            return [fixed_group(rows, size, settings.batch_size or 1)], rows
        drawn_by = {"seed": settings.seed, "crop": crop, "frame_interval": self.dataset.frame_interval}
        return bucket_groups(self.table, rows, settings.bucket_config, **drawn_by)

    def _identity(self) -> dict[str, Any]:
        """The settings that decide the features of a row; the weights come in addition."""
        settings, dataset, buckets = self.settings, self.dataset, self.settings.bucket_config
        fixed = {name: getattr(dataset, name, None) for name in ("num_frames", "image_size")}
        return {
            "format": FORMAT, "sizes": [entry[:-1] for entry in Buckets(buckets).entries] if buckets else fixed,
            "frame_interval": dataset.frame_interval, "transform_name": dataset.transform, "seed": settings.seed,
            "dtype": settings.dtype, "save_dtype": settings.save_dtype, "bin_size": settings.bin_size,
            "last_frames": settings.save_last_frames, "micro_frame_size": getattr(self.vae, "micro_frame_size", None),
            "model_max_length": getattr(self.text_encoder, "model_max_length", None),
        }  # fmt: skip

    def _max_samples(self, size: tuple[int, int, int]) -> int:
        """The most samples of a shard."""
        numbers = self.vae.out_channels * int(np.prod(self.vae.get_latent_size(size)))
        return max(1, min(self.settings.bin_size, SHARD_BYTES // (numbers * DTYPES[self.settings.save_dtype].itemsize)))

    def _load(self, what: str, wanted: bool) -> tuple[Any, str | None]:
        """A frozen encoder and the SHA-256 of its weights, or None; sets `tokenizer`."""
        section = getattr(self.settings, what)
        if not wanted:
            return None, None
        if section is None:
            raise ConfigError(f"encoding needs a section {what}; add it to the configuration")
        encoder, summary = builder.load_component(section, what, self.device, self.dtype, self.settings.offline)
        self.tokenizer = builder.tokenizer_sha256(summary.path) if what == "text_encoder" else {}
        return encoder, summary.sha256

    def _write_plan(self, latents: Sequence[LatentShard], texts: Sequence[TextShard]) -> None:
        parts = [
            {"file": s.file, "crop": s.crop, "bucket": s.bucket, "size": s.size, "batch_size": s.batch_size}
            for s in latents
        ]
        plan = {"num_rows": len(self.table), "num_crops": self.settings.crops, "latents": parts}
        plan["table"] = os.path.abspath(self.table.source)
        plan["text"] = [{"file": shard.file} for shard in texts]
        self.writer.save_json(PLAN, plan)

    def _encode_latents(self, shards: Sequence[LatentShard]) -> None:
        if not shards:
            return
        name = f"quarantine.rank{self.rank}.jsonl" if self.rank else "quarantine.jsonl"
        quarantine = Quarantine(self.folder / name, len(self.table), table=self.table)
        quarantine.check()
        encoder = LatentEncoder(
            self.dataset, self.vae, self.device, self.dtype, self.writer, quarantine,
            self.settings.num_workers, self.settings.save_last_frames,
        )  # fmt: skip
        encoder.encode(shards, show_progress=self.rank == 0)


def make_dataset(settings: ExtractSettings) -> VideoTextDataset | VariableVideoTextDataset:
    """The data set of the settings; frames are uint8. Raises ConfigError."""
    section = settings.dataset
    if section is None:
        raise ConfigError("encoding needs a section dataset; add it to the configuration")
    check_type("dataset", section["type"], registry.DATASETS)
    if (section["type"] == "VariableVideoTextDataset") != (settings.bucket_config is not None):
        problem = "VariableVideoTextDataset and bucket_config go together"
        raise ConfigError(f"dataset: {problem}; without buckets take VideoTextDataset with num_frames and image_size")
    return registry.build({**section, "seed": settings.seed, "as_uint8": True})


def _own_device(name: str | None) -> torch.device:
    """The device of this process: one each, shared if a machine has more processes than devices."""
    device = pick_device(name)
    if device.index is None:
        set_device(device, ranks().local_rank, share=True)
    return device
