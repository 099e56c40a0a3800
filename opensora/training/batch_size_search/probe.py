"""Real training steps of any size, to find out how long they take and whether they fit.

The model is built and placed once. Each step is one of training: frame masks, loss, backward pass, optimizer and
average. Its data are random, of the bucket's size, because neither time nor memory depends on what a clip shows. The
frozen encoders take part where training runs them: if the configuration names them, and no features are loaded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opensora import registry
from opensora.acceleration.activation_checkpointing import checkpoint_blocks
from opensora.acceleration.device import inference_dtype, pick_device, place, training_context
from opensora.acceleration.model_parts import blocks_of
from opensora.checkpoints import builder
from opensora.config.settings import SearchSettings
from opensora.datasets.aspect import SIZES
from opensora.datasets.bucket import Buckets
from opensora.datasets.table import Table, read_table
from opensora.errors import ConfigError
from opensora.models.layers.transformer import FixedPositions
from opensora.models.sizes import size_conditioning
from opensora.profiling.memory_meter import MemoryMeter, bounded_host_memory, is_out_of_memory
from opensora.training.batch_size_search.search import NoData, Outcome, OutOfMemory, Span, Step
from opensora.training.masks import MaskRatios

CHUNK, CHUNK_LATENTS, PATCH = 17, 5, 8  # what the video autoencoder makes of frames and pixels
FPS = 24


class TrainingProbe:
    """A probe for `search.search`: `probe(span, batch_size)` takes a few training steps and tells their average time.

    `settings.dataset` may name a table; a bucket then has to have the rows for a batch. Raises ConfigError for
    settings that cannot be trained with.
    """

    def __init__(self, settings: SearchSettings) -> None:
        self.settings, self.device = settings, pick_device(settings.device)
        torch.manual_seed(settings.seed)
        if settings.scheduler is None:
            raise ConfigError("the search takes training steps, which needs a scheduler")
        if issubclass(registry.builder(settings.model["type"]), FixedPositions):
            raise ConfigError(f"model '{settings.model['type']}' is built for one size; search for STDiT2 or STDiT3")
        self.scheduler = registry.build(settings.scheduler)
        self.ratios = None if settings.mask_ratios is None else MaskRatios(settings.mask_ratios)
        self.table = _table(settings)
        self.vae = self._encoder("vae", settings.load_video_features)
        self.text_encoder = self._encoder("text_encoder", settings.load_text_features)
        self.model = self._model()
        self.config = self.model.config
        self.meter = MemoryMeter(self.device)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        # With a learning rate of 0 all is computed as ever, but random data lead nowhere.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, eps=settings.adam_eps, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.dtype == "fp16")

    def __call__(self, span: Span, batch_size: int) -> Outcome:
        if self.table is not None and (most := rows_of(self.table, span, self._interval)) < batch_size:
            return NoData(most)
        self.meter.reset()
        try:
            with bounded_host_memory():
                seconds = self._average_time(self._batches(span, batch_size))
            return Step(seconds, self.meter.peak())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self.meter.reset()
        return OutOfMemory()

    @property
    def _interval(self) -> int:
        return (self.settings.dataset or {}).get("frame_interval", 1)

    def _encoder(self, what: str, loaded: bool) -> Any:
        """The frozen encoder that training runs, or None if its features are loaded or random."""
        section = getattr(self.settings, what)
        if section is None or loaded or section["type"] in builder.WITHOUT_WEIGHTS:
            return None
        dtype = inference_dtype(self.device, self.settings.dtype)
        return builder.load_component(section, what, self.device, dtype, self.settings.offline)[0]

    def _model(self) -> nn.Module:
        fitting: dict[str, Any] = {"in_channels": self.vae.out_channels} if self.vae is not None else {}
        if self.text_encoder is not None:
            fitting |= {"caption_channels": self.text_encoder.output_dim}
            fitting |= {"model_max_length": self.text_encoder.model_max_length}
        model = builder.build_model({**self.settings.model, "strict": False}, None, fitting)
        model = place(model, self.device).train()
        if self.settings.grad_checkpoint:
            checkpoint_blocks(model)
        if self.settings.compile:
            for block in blocks_of(model):
                block.forward = torch.compile(block.forward, dynamic=True)
        return model

    def _average_time(self, loss: Callable[[], Tensor]) -> float:
        """Seconds of a step, on average over `active_steps`; the first ones do not count."""
        for _ in range(self.settings.untimed_steps):
            self._step(loss)
        self.meter.wait()
        began = time.perf_counter()
        for _ in range(self.settings.active_steps):
            self._step(loss)
        self.meter.wait()
        return (time.perf_counter() - began) / self.settings.active_steps

    def _step(self, loss: Callable[[], Tensor]) -> None:
        with training_context(self.device, self.settings.dtype):
            self.scaler.scale(loss()).backward()  # inside: with checkpointing it computes blocks again
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - self.settings.ema_decay)

    def _batches(self, span: Span, batch_size: int) -> Callable[[], Tensor]:
        """The loss of a random batch of the bucket's size."""
        size = size_of(span)
        told = size_conditioning("STDiT2", batch_size, size[1:], size[0], FPS, device=self.device)

        def loss() -> Tensor:
            latents = self._latents(batch_size, size)
            given = None
            if self.ratios is not None:
                given = self.ratios.draw(batch_size, latents.shape[2], self.generator).to(self.device)
            where = {"num_frames": size[0], "height": size[1], "width": size[2]}
            cond = {**told, **self._text(batch_size)}
            how = {**where, "mask": given, "generator": self.generator}
            return self.scheduler.training_loss(self.model, latents, cond, **how).mean()

        return loss

    def _latents(self, batch_size: int, size: tuple[int, int, int]) -> Tensor:
        """[B, C, T', H / 8, W / 8]."""
        if self.vae is None:
            return torch.randn(batch_size, self.config["in_channels"], *latent_size(size), device=self.device)
        dtype = inference_dtype(self.device, self.settings.dtype)
        video = torch.rand(batch_size, 3, *size, device=self.device, dtype=dtype)
        with torch.no_grad():
            return self.vae.encode(2 * video - 1, sample=False).float()

    def _text(self, batch_size: int) -> dict[str, Tensor]:
        """`y` and its mask; texts of the greatest length."""
        length = self.config["model_max_length"]
        if self.text_encoder is not None:
            y, mask = self.text_encoder.encode(["word " * length] * batch_size)
            return {"y": y, "mask": mask}
        shape = (batch_size, 1, length, self.config["caption_channels"])
        if self.config.get("skip_y_embedder"):  # packed and projected already
            shape = (1, batch_size * length, self.config["hidden_size"])
        mask = torch.ones(batch_size, length, dtype=torch.int64, device=self.device)
        return {"y": torch.randn(shape, device=self.device), "mask": mask}


def size_of(span: Span) -> tuple[int, int, int]:
    """(T, H, W) of the largest of a bucket's aspect ratios, in frames and pixels."""
    return (span.num_frames, *max(SIZES[span.resolution].values(), key=math.prod))


def latent_size(size: tuple[int, int, int]) -> tuple[int, int, int]:
    """(T', H', W') of what the autoencoder of Open-Sora 1.2 makes of a clip."""
    frames, height, width = size
    chunks, rest = divmod(frames, CHUNK)
    return chunks * CHUNK_LATENTS + math.ceil(rest / 4), height // PATCH, width // PATCH


def rows_of(table: Table, span: Span, frame_interval: int = 1) -> int:
    """The number of rows of a table that can make one batch of the bucket, all of the same aspect ratio."""
    buckets = Buckets({span.resolution: {span.num_frames: (1.0, 1)}})
    _, _, _, group = buckets.assign(*table.sizes(), seed=0, frame_interval=frame_interval).groups()
    return int(np.bincount(group).max()) if len(group) else 0


def _table(settings: SearchSettings) -> Table | None:
    path = (settings.dataset or {}).get("data_path")
    return read_table(path) if path else None
