"""Encodes the shards of a features folder: captions by the text encoder, videos by the autoencoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from opensora.datasets.datasets import VariableVideoTextDataset, VideoTextDataset, collate, to_model_range
from opensora.datasets.feature_files import caption_key
from opensora.datasets.file_content import content_keys, file_stamps
from opensora.datasets.quarantine import Quarantine
from opensora.datasets.table import Table
from opensora.models.text_encoder.cleaning import preprocess
from opensora.training.feature_extraction.shard_writer import ShardWriter
from opensora.training.feature_extraction.shards import LatentShard, TextShard

TEXT_BATCH = 16


def encode_texts(
    shards: Sequence[TextShard], table: Table, text_encoder: Any, writer: ShardWriter, show_progress: bool
) -> None:
    """Encodes and writes the captions of `shards`, without padding."""
    if not shards:
        return
    progress = progress_bar("texts", sum(len(shard.rows) for shard in shards), "text", show_progress)
    assert table.text is not None, "shards of texts are planned for tables with captions only"
    for shard in shards:
        captions = [table.text[row] for row in shard.rows.tolist()]
        encoded: dict[int, Tensor] = {}
        by_length = sorted(range(len(captions)), key=lambda number: len(captions[number]))
        for start in range(0, len(captions), TEXT_BATCH):
            numbers = by_length[start : start + TEXT_BATCH]
            y, mask = text_encoder.encode([preprocess(captions[number]) for number in numbers])
            for number, features, text_mask in zip(numbers, y[:, 0], mask.bool(), strict=True):
                encoded[number] = features[text_mask].cpu()
            progress.update(len(numbers))
        texts = [encoded[number] for number in range(len(captions))]
        writer.save(
            shard.file,
            text=writer.cast(torch.cat(texts), shard.file),
            length=torch.tensor([len(text) for text in texts], dtype=torch.int32),
            row=torch.from_numpy(shard.rows),
            key=torch.from_numpy(np.stack([caption_key(caption) for caption in captions])),
        )
    progress.close()


class LatentEncoder:
    """Encodes and writes the videos of shards.

    quarantine: counts unreadable files
    last_frames: also encode the last frame of each clip as an image
    """

    def __init__(
        self, dataset: VideoTextDataset | VariableVideoTextDataset, vae: Any, device: torch.device,
        dtype: torch.dtype, writer: ShardWriter, quarantine: Quarantine, num_workers: int, last_frames: bool,
    ) -> None:  # fmt: skip
        self.dataset, self.vae, self.device, self.dtype = dataset, vae, device, dtype
        self.writer, self.quarantine = writer, quarantine
        self.num_workers, self.last_frames = num_workers, last_frames

    def encode(self, shards: Sequence[LatentShard], show_progress: bool) -> None:
        """Encodes shards, crop by crop; videos are decoded in the background."""
        progress = progress_bar("videos", sum(shard.num_pixels for shard in shards), "px", show_progress)
        for crop in sorted({shard.crop for shard in shards}):
            self.dataset.set_epoch(crop)
            own = [shard for shard in shards if shard.crop == crop]
            batches = iter(self._loader(own))
            for shard in own:
                self._encode_shard(shard, batches, progress)
        progress.close()

    def _encode_shard(self, shard: LatentShard, batches: Iterator[dict[str, Any]], progress: tqdm) -> None:
        paths = [self.dataset.table.file(row) for row in shard.rows.tolist()]
        stamps, keys = file_stamps(paths), content_keys(paths)
        rows, fps, latents, last = [], [], [], []
        for asked in _batches(shard):
            batch = next(batches)
            self.quarantine.add(batch["unreadable"])
            unreadable = {one.row for one in batch["unreadable"]}
            if "video" in batch:
                clips, ends = self._encode_batch(batch["video"])
                latents.append(clips)
                last.append(ends)
                rows += [row for row in asked.tolist() if row not in unreadable]
                fps.append(batch["fps"].float())
            progress.update(len(asked) * int(np.prod(shard.size)))
            progress.set_postfix_str(f"{len(self.quarantine)} broken", refresh=False)
        tensors = {"latents": self.writer.cast(_concatenated(latents), shard.file)}
        tensors |= {"fps": _concatenated(fps), "row": torch.tensor(rows, dtype=torch.int64)}
        if self.last_frames and shard.size[0] > 1:
            tensors["last"] = self.writer.cast(_concatenated(last), shard.file)
        sources = {"planned": shard.rows, "stamp": stamps, "key": keys}
        if self.dataset.table.parts is not None:
            sources["part"] = self.dataset.table.parts_of(shard.rows)
        self.writer.save(shard.file, **tensors, **{name: torch.from_numpy(one) for name, one in sources.items()})

    @torch.no_grad()
    def _encode_batch(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, C, T', h, w] of frames uint8 [B, 3, T, H, W], and those of the last frame [B, C, h, w]."""
        levels = to_model_range(video.to(self.device)).to(self.dtype)
        latents = self.vae.encode(levels, sample=False).cpu()
        if not self.last_frames or video.shape[2] == 1:
            return latents, latents[:, :, -1]
        return latents, self.vae.encode(levels[:, :, -1:], sample=False)[:, :, 0].cpu()

    def _loader(self, shards: Sequence[LatentShard]) -> DataLoader:
        """The batches of all shards in order."""
        keys = [[self._key(row, shard.size) for row in part.tolist()] for shard in shards for part in _batches(shard)]
        return DataLoader(self.dataset, batch_sampler=keys, num_workers=self.num_workers, collate_fn=collate)

    def _key(self, row: int, size: tuple[int, int, int]) -> int | str:
        fixed_size = isinstance(self.dataset, VideoTextDataset)
        return row if fixed_size else "-".join(map(str, (row, *size)))


def progress_bar(what: str, total: int, unit: str, show: bool) -> tqdm:
    """A progress bar with the remaining time."""
    return tqdm(desc=f"encoding {what}", total=total, unit=unit, unit_scale=True, disable=not show or not total)


def _batches(shard: LatentShard) -> Iterator[np.ndarray]:
    """The rows that are encoded together."""
    return (shard.rows[start : start + shard.batch_size] for start in range(0, len(shard.rows), shard.batch_size))


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0)
