"""Times training steps of any batch size, and finds out whether they fit into memory.

The model is built once, and trained by the trainer's own `TrainStep`. Data are random, of the bucket's size, because
neither time nor memory depends on what a clip shows. The frozen encoders take part as in training: if the configuration
names them, and no features are loaded.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora import registry
from opensora.acceleration.device import pick_device
from opensora.acceleration.placement import to_device
from opensora.acceleration.precision import DTYPES, inference_dtype, training_context
from opensora.checkpoints import builder
from opensora.checkpoints.sections import WITHOUT_WEIGHTS
from opensora.config.settings import SearchSettings
from opensora.datasets.aspect import SIZES
from opensora.datasets.bucket import Buckets
from opensora.datasets.table import Table, read_table
from opensora.distributed.parallelize import parallelize
from opensora.distributed.process_group import RankLayout
from opensora.errors import ConfigError
from opensora.models.layers.fixed_positions import FixedPositions
from opensora.models.layers.transformer import PatchTransformer
from opensora.profiling.memory_meter import MemoryMeter, bounded_host_memory, is_out_of_memory
from opensora.training.batch_size_search.search import NoData, Outcome, OutOfMemory, Span, Step
from opensora.training.data.batch import Size, TrainingBatch, clip_conditioning, encode_texts, encode_videos
from opensora.training.diffusion import check_training
from opensora.training.losses.diffusion import DiffusionLoss
from opensora.training.optimization import Optimization
from opensora.training.step import TrainStep

CHUNK, CHUNK_LATENTS, PATCH = 17, 5, 8  # frames of a chunk, their latent frames, pixels of a latent
FPS = 24
FROZEN = 0.0  # learning rate: a whole step is computed, but random data change no weight


class TrainingProbe:
    """`probe(span, batch_size)` takes a few training steps and returns their mean time, for `search.search`.

    `settings.dataset` may name a table; a bucket then needs the rows for a batch. Raises ConfigError for settings that
    cannot be trained.
    """

    def __init__(self, settings: SearchSettings) -> None:
        self.settings, self.device = settings, pick_device(settings.device)
        torch.manual_seed(settings.seed)
        scheduler, ratios = check_training(settings)
        if issubclass(registry.builder(settings.model["type"]), FixedPositions):
            raise ConfigError(f"model '{settings.model['type']}' is built for one size; search for STDiT2 or STDiT3")
        self.table = _table(settings)
        self.dtype = inference_dtype(self.device, settings.dtype)
        self.vae = self._encoder("vae", settings.load_video_features)
        self.text_encoder = self._encoder("text_encoder", settings.load_text_features)
        self.model = self._build_model()
        self.optimization = Optimization(self.model, settings, self.device)
        loss = DiffusionLoss(self.model, scheduler, ratios)
        self.train_step = TrainStep(settings, loss, self.optimization, encode=self._encode)
        self.step = 0
        self.meter = MemoryMeter(self.device)

    def __call__(self, span: Span, batch_size: int) -> Outcome:
        if self.table is not None and (most := rows_of(self.table, span, self._interval)) < batch_size:
            return NoData(most)
        self.meter.reset()
        try:
            with bounded_host_memory():
                seconds = self._mean_time(self._random_batch(size_of(span), batch_size))
            return Step(seconds, self.meter.peak())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        finally:
            self.train_step.reset()
        self.meter.reset()
        return OutOfMemory()

    @property
    def _interval(self) -> int:
        return (self.settings.dataset or {}).get("frame_interval", 1)

    def _encoder(self, what: str, has_features: bool) -> Any:
        """The frozen encoder that training runs, or None if its features are loaded or random."""
        section = getattr(self.settings, what)
        if section is None or has_features or section["type"] in WITHOUT_WEIGHTS:
            return None
        return builder.load_component(section, what, self.device, self.dtype, self.settings.offline)[0]

    def _build_model(self) -> PatchTransformer:
        """The model as training builds it, with random weights."""
        settings = self.settings
        fitting: dict[str, Any] = {"in_channels": self.vae.out_channels} if self.vae is not None else {}
        forced = {}
        if self.text_encoder is not None:
            fitting |= {"caption_channels": self.text_encoder.output_dim}
            fitting |= {"model_max_length": self.text_encoder.model_max_length}
        else:
            forced["skip_y_embedder"] = False  # features are those of the text encoder
        model = builder.build_model({**settings.model, "strict": False}, None, fitting, forced)
        model = to_device(model, self.device).train()
        parallelize(model, RankLayout(), DTYPES[settings.dtype], settings.grad_checkpoint, settings.compile)
        return model

    def _mean_time(self, batch: dict[str, Any]) -> float:
        """Mean seconds of `active_steps` steps, after `untimed_steps`."""
        for _ in range(self.settings.untimed_steps):
            self._take_step(batch)
        self._wait()
        began = time.perf_counter()
        for _ in range(self.settings.active_steps):
            self._take_step(batch)
        self._wait()
        return (time.perf_counter() - began) / self.settings.active_steps

    def _take_step(self, batch: dict[str, Any]) -> None:
        batches = [batch] * self.settings.accumulation_steps
        self.train_step(self.step, batches, len(batch["names"]) * len(batches), FROZEN)
        self.train_step.losses.clear()
        self.step += 1

    def _wait(self) -> None:
        self.train_step.finish_pending()
        self.meter.wait()

    def _random_batch(self, size: Size, batch_size: int) -> dict[str, Any]:
        """A batch as the loader of training reads it, on the CPU: videos or latents, and captions or text features."""
        config = self.model.config
        batch: dict[str, Any] = {"size": size, "names": [f"clip {number}" for number in range(batch_size)]}
        if self.vae is not None:
            batch["video"] = torch.randint(0, 256, (batch_size, 3, *size), dtype=torch.uint8)
        else:
            batch["latents"] = torch.randn(batch_size, config["in_channels"], *latent_size(size))
        length = config["model_max_length"]
        if self.text_encoder is not None:
            batch["text"] = ["word " * length] * batch_size  # of the greatest length
        else:
            batch["y"] = torch.randn(batch_size, 1, length, config["caption_channels"])
            batch["mask"] = torch.ones(batch_size, length, dtype=torch.int64)
        return batch

    @torch.no_grad()
    def _encode(self, batch: dict[str, Any]) -> TrainingBatch:
        """A random batch on the device, encoded as in training."""
        with training_context(self.device, self.settings.dtype):
            latents = (
                encode_videos(self.vae, batch["video"], self.device, self.dtype) if "video" in batch
                else batch["latents"]
            )  # fmt: skip
            text: dict[str, Tensor] = (
                encode_texts(self.text_encoder, batch["text"]) if "text" in batch
                else {name: batch[name] for name in ("y", "mask")}
            )  # fmt: skip
        sizes = clip_conditioning(self.settings.model["type"], len(latents), batch["size"], FPS)
        return TrainingBatch(latents, {**text, **sizes}, batch["size"], batch["names"]).to(self.device)


def size_of(span: Span) -> Size:
    """(T, H, W) of a bucket's largest aspect ratio, in frames and pixels."""
    return (span.num_frames, *max(SIZES[span.resolution].values(), key=math.prod))


def latent_size(size: Size) -> Size:
    """(T', H', W') of the latents of Open-Sora 1.2's autoencoder."""
    frames, height, width = size
    chunks, rest = divmod(frames, CHUNK)
    return chunks * CHUNK_LATENTS + math.ceil(rest / 4), height // PATCH, width // PATCH


def rows_of(table: Table, span: Span, frame_interval: int = 1) -> int:
    """The largest batch of the bucket that the table has rows for, all of one aspect ratio."""
    buckets = Buckets({span.resolution: {span.num_frames: (1.0, 1)}})
    _, _, _, group = buckets.assign(*table.sizes(), seed=0, frame_interval=frame_interval).groups()
    return int(np.bincount(group).max()) if len(group) else 0


def _table(settings: SearchSettings) -> Table | None:
    path = (settings.dataset or {}).get("data_path")
    return read_table(path) if path else None
