"""Latents and texts of a table of videos, encoded once: training then needs neither autoencoder nor text encoder.

Crop `c` of a row is what epoch `c` of a training run with the same seed would see: the same bucket, the same frames.
Under torchrun the shards are divided over the ranks, which need not talk to one another. See
`opensora/datasets/encoded.py` for what is written, and how training reads it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from opensora import registry
from opensora.acceleration.device import DTYPES, inference_dtype, keep_allocations_in_heap, pick_device, take_own
from opensora.checkpoints import builder
from opensora.checkpoints.save import save_file
from opensora.config.settings import ExtractSettings
from opensora.datasets.bucket import Buckets
from opensora.datasets.datasets import VariableVideoTextDataset, VideoTextDataset, collate, to_levels
from opensora.datasets.feature_files import PLAN, caption_key
from opensora.datasets.file_content import content_keys, file_stamps
from opensora.datasets.quarantine import Quarantine
from opensora.distributed.ranks import ranks
from opensora.errors import ConfigError, MediaError
from opensora.files import why
from opensora.models.text_encoder.cleaning import preprocess
from opensora.training.checkpoint.state import replace_text
from opensora.training.data.table_checks import check_texts, missing_files
from opensora.training.feature_extraction.clips import claim
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

FORMAT = 1  # of what is written, and of how videos and captions are prepared
SHARD_BYTES = 2**28  # of latents, at most
TEXT_BATCH = 16


def extract(settings: ExtractSettings) -> Path:
    """Encodes what is not there yet; returns the folder. Raises ConfigError, WeightsError or MediaError."""
    return Extraction(settings).run()


class Extraction:
    """One rank's share of the work; rank and number of ranks are those of the environment, as torchrun sets it."""

    def __init__(self, settings: ExtractSettings) -> None:
        self.settings, self.folder = settings, Path(settings.save_dir)
        self.rank, self.world_size, _ = ranks()
        keep_allocations_in_heap()
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
        self.tokenizer: dict[str, str] = {}  # its hash, if texts are encoded
        self.vae, vae_hash = self._load("vae", settings.save_video_features)
        self.text_encoder, text_hash = self._load("text_encoder", settings.save_text_features)
        self.identity = {**self._how(), "vae": vae_hash, "text_encoder": text_hash}
        self.identity |= self.tokenizer

    def run(self) -> Path:
        """Encodes this rank's share of the shards that are missing."""
        latents, texts = self.plan()
        claim(self.folder, self.identity, write=self.rank == 0)
        if self.rank == 0:
            self._write_plan(latents, texts)
        share = slice(self.rank, None, self.world_size)
        absent = [
            missing(self.folder, part[share], self.table, self.settings.replace_stale) for part in (texts, latents)
        ]
        self._encode_texts(absent[0])
        self.text_encoder = None  # makes room on the device
        self._encode_latents(absent[1])
        return self.folder

    def plan(self) -> tuple[list[LatentShard], list[TextShard]]:
        """All shards, whether they are there or not, of all ranks."""
        settings, rows, latents = self.settings, self.rows, []
        if not len(rows):
            raise ConfigError(f"{self.table.source}: no rows from {settings.start_index} on, end_index excluded")
        used = np.empty(0, np.int64)
        for crop in range(settings.crops):
            groups, possible = self._groups(rows, crop)
            used = np.union1d(used, possible)
            latents += latent_shards(groups, crop, self._most) if self.vae else []
        if not len(used) or (self.vae and not latents):
            problem = f"none of the {len(rows)} rows has a bucket"
            raise ConfigError(f"{self.table.source}: {problem}; see what each asks for with `opensora buckets`")
        return latents, text_shards(used, settings.bin_size) if self.text_encoder else []

    def _groups(self, rows: np.ndarray, crop: int) -> tuple[list[Group], np.ndarray]:
        settings = self.settings
        if settings.bucket_config is None:
            size = (self.dataset.num_frames, *self.dataset.image_size)
            return [fixed_group(rows, size, settings.batch_size or 1)], rows
        how_drawn = {"seed": settings.seed, "crop": crop, "frame_interval": self.dataset.frame_interval}
        return bucket_groups(self.table, rows, settings.bucket_config, **how_drawn)

    def _how(self) -> dict[str, Any]:
        """Everything but the weights that decides what the features of a row are."""
        settings, dataset, buckets = self.settings, self.dataset, self.settings.bucket_config
        fixed = {name: getattr(dataset, name, None) for name in ("num_frames", "image_size")}
        return {
            "format": FORMAT, "sizes": [entry[:-1] for entry in Buckets(buckets).entries] if buckets else fixed,
            "frame_interval": dataset.frame_interval, "transform_name": dataset.transform, "seed": settings.seed,
            "dtype": settings.dtype, "save_dtype": settings.save_dtype, "bin_size": settings.bin_size,
            "last_frames": settings.save_last_frames, "micro_frame_size": getattr(self.vae, "micro_frame_size", None),
            "model_max_length": getattr(self.text_encoder, "model_max_length", None),
        }  # fmt: skip

    def _most(self, size: tuple[int, int, int]) -> int:
        """Samples of a shard."""
        numbers = self.vae.out_channels * int(np.prod(self.vae.get_latent_size(size)))
        return max(1, min(self.settings.bin_size, SHARD_BYTES // (numbers * DTYPES[self.settings.save_dtype].itemsize)))

    def _load(self, what: str, wanted: bool) -> tuple[Any, str | None]:
        """A frozen encoder and the SHA-256 of its weights; that of its tokenizer is kept."""
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
        try:
            replace_text(self.folder / PLAN, json.dumps(plan, indent=1))
        except OSError as error:
            raise _unwritable(self.folder / PLAN, error) from error

    def _encode_texts(self, shards: Sequence[TextShard]) -> None:
        progress = self._progress("texts", sum(len(shard.rows) for shard in shards), unit="text")
        for shard in shards:
            captions = [self.table.text[row] for row in shard.rows.tolist()]
            made: dict[int, Tensor] = {}
            by_length = sorted(range(len(captions)), key=lambda number: len(captions[number]))
            for start in range(0, len(captions), TEXT_BATCH):
                numbers = by_length[start : start + TEXT_BATCH]
                text, mask = self.text_encoder.encode([preprocess(captions[number]) for number in numbers])
                for number, features, keep in zip(numbers, text[:, 0], mask.bool(), strict=True):
                    made[number] = features[keep].cpu()
                progress.update(len(numbers))
            texts = [made[number] for number in range(len(captions))]
            self._save(
                shard.file,
                text=self._stored(torch.cat(texts), shard.file),
                length=torch.tensor([len(text) for text in texts], dtype=torch.int32),
                row=torch.from_numpy(shard.rows),
                key=torch.from_numpy(np.stack([caption_key(caption) for caption in captions])),
            )
        progress.close()

    def _encode_latents(self, shards: Sequence[LatentShard]) -> None:
        if not shards:
            return
        name = f"quarantine.rank{self.rank}.jsonl" if self.rank else "quarantine.jsonl"
        quarantine = Quarantine(self.folder / name, len(self.table), table=self.table)
        quarantine.check()
        progress = self._progress("videos", sum(shard.num_pixels for shard in shards), unit="px")
        for crop in sorted({shard.crop for shard in shards}):
            self.dataset.set_epoch(crop)
            own = [shard for shard in shards if shard.crop == crop]
            batches = iter(self._loader(own))
            for shard in own:
                self._encode_shard(shard, batches, quarantine, progress)
        progress.close()

    def _encode_shard(
        self, shard: LatentShard, batches: Iterator[dict[str, Any]], quarantine: Quarantine, progress: tqdm
    ) -> None:
        paths = [self.table.file(row) for row in shard.rows.tolist()]
        stamps, keys = file_stamps(paths), content_keys(paths)
        rows, fps, latents, last = [], [], [], []
        for asked in _batched(shard):
            batch = next(batches)
            quarantine.add(batch["broken"])
            broken = {one.row for one in batch["broken"]}
            if "video" in batch:
                parts = self._encode(batch["video"])
                latents.append(parts[0])
                last.append(parts[1])
                rows += [row for row in asked.tolist() if row not in broken]
                fps.append(batch["fps"].float())
            progress.update(len(asked) * int(np.prod(shard.size)))
            progress.set_postfix_str(f"{len(quarantine)} broken", refresh=False)
        tensors = {"latents": _joined(latents), "fps": _joined(fps), "row": torch.tensor(rows, dtype=torch.int64)}
        if self.settings.save_last_frames and shard.size[0] > 1:
            tensors["last"] = _joined(last)
        for kind in ("latents", "last"):
            if kind in tensors:
                tensors[kind] = self._stored(tensors[kind], shard.file)
        sources = {"planned": shard.rows, "stamp": stamps, "key": keys}
        self._save(shard.file, **tensors, **{name: torch.from_numpy(column) for name, column in sources.items()})

    @torch.no_grad()
    def _encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, C, T', h, w] of frames uint8 [B, 3, T, H, W], and those of the last frame [B, C, h, w]."""
        levels = to_levels(video.to(self.device)).to(self.dtype)
        latents = self.vae.encode(levels, sample=False).cpu()
        if not self.settings.save_last_frames or video.shape[2] == 1:
            return latents, latents[:, :, -1]
        return latents, self.vae.encode(levels[:, :, -1:], sample=False)[:, :, 0].cpu()

    def _loader(self, shards: Sequence[LatentShard]) -> DataLoader:
        """The batches of all shards in their order, decoded in the background."""
        asked = [
            [self._index(row, shard.size) for row in part.tolist()] for shard in shards for part in _batched(shard)
        ]
        workers = self.settings.num_workers
        return DataLoader(self.dataset, batch_sampler=asked, num_workers=workers, collate_fn=collate)

    def _index(self, row: int, size: tuple[int, int, int]) -> int | str:
        fixed = isinstance(self.dataset, VideoTextDataset)
        return row if fixed else "-".join(map(str, (row, *size)))

    def _stored(self, tensor: Tensor, name: str) -> Tensor:
        """In the type that is kept; ConfigError where that cannot hold the numbers."""
        stored = tensor.to(DTYPES[self.settings.save_dtype])
        if not stored.isfinite().all():
            problem = f"features beyond what {self.settings.save_dtype} can hold, or NaN"
            raise ConfigError(f"{self.folder / name}: {problem}; set save_dtype='bf16', or dtype='fp32' if it is NaN")
        return stored

    def _save(self, name: str, **tensors: Tensor) -> None:
        """Writes a shard whole or not at all; what a killed run left of it is swept away."""
        path = self.folder / name
        for leftover in path.parent.glob(f".*.{path.name}"):
            shutil.rmtree(leftover, ignore_errors=True)
        own = path.with_name(f".{os.getpid()}.{path.name}")  # with what safetensors may leave there
        try:
            own.mkdir(parents=True)
            save_file(tensors, own / ".whole.safetensors")
            os.replace(own / ".whole.safetensors", path)
        except OSError as error:
            raise _unwritable(path, error) from error
        finally:
            shutil.rmtree(own, ignore_errors=True)

    def _progress(self, what: str, total: int, unit: str) -> tqdm:
        """A bar with the time left, on the first rank: the others have as much to do."""
        return tqdm(
            desc=f"encoding {what}", total=total, unit=unit, unit_scale=True, disable=self.rank > 0 or not total
        )


def make_dataset(settings: ExtractSettings) -> VideoTextDataset | VariableVideoTextDataset:
    """The data set of the settings, in 8 bits; ConfigError if its section is not understood."""
    section = settings.dataset
    if section is None:
        raise ConfigError("encoding needs a section dataset; add it to the configuration")
    registry.check_type("dataset", section["type"], registry.DATASETS)
    if (section["type"] == "VariableVideoTextDataset") != (settings.bucket_config is not None):
        problem = "VariableVideoTextDataset and bucket_config go together"
        raise ConfigError(f"dataset: {problem}; without buckets take VideoTextDataset with num_frames and image_size")
    return registry.build({**section, "seed": settings.seed, "as_uint8": True})


def _unwritable(path: Path, error: OSError) -> MediaError:
    return MediaError(f"{path}: cannot be written ({why(error)}); free some space, or name another --save-dir")


def _batched(shard: LatentShard) -> Iterator[np.ndarray]:
    """The rows that are encoded together."""
    return (shard.rows[start : start + shard.batch_size] for start in range(0, len(shard.rows), shard.batch_size))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0)


def _own_device(name: str | None) -> torch.device:
    """The device of this process; processes on one machine get one each, and share them if they are more."""
    device = pick_device(name)
    if device.index is None:
        take_own(device, ranks().local, share=True)
    return device
