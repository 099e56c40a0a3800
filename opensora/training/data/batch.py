"""The batch of a training step, and the frozen encoders that make it from videos and captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opensora.acceleration.precision import inference_dtype, training_context
from opensora.checkpoints import builder
from opensora.checkpoints.sections import WITHOUT_WEIGHTS
from opensora.config.settings import TrainSettings
from opensora.datasets.datasets import to_model_range
from opensora.distributed.process_group import RankLayout
from opensora.models.sizes import conditioning_kind, size_conditioning
from opensora.models.text_encoder.classes import ClassIds
from opensora.models.text_encoder.cleaning import preprocess

Size = tuple[int, int, int]  # (T, H, W) in frames and pixels


class TrainingBatch(NamedTuple):
    """Encoded clips of one size.

    latents: [B, C, T', H / 8, W / 8]
    cond: conditioning of the model: y [B, 1, L, C_text] and its mask [B, L] (or classes [B]), and sizes
    size: (T, H, W) in frames and pixels
    names: of the clips, for messages
    last: latents [B, C, H / 8, W / 8] of the last frames, encoded as images, if known
    weight: of this batch in the loss; 0 when none of its clips could be read
    continued: whether the text describes the second half alone, which continues the given first half
    altered: latents like `latents`, of the clips with another color or shape, if known
    """

    latents: Tensor
    cond: dict[str, Tensor]
    size: Size
    names: list[str]
    last: Tensor | None = None
    weight: float = 1.0
    continued: bool = False
    altered: Tensor | None = None

    def to(self, device: torch.device) -> TrainingBatch:
        """The batch on a device, by asynchronous copies."""
        cond = {name: value.to(device, non_blocking=True) for name, value in self.cond.items()}
        last = None if self.last is None else self.last.to(device, non_blocking=True)
        altered = None if self.altered is None else self.altered.to(device, non_blocking=True)
        latents = self.latents.to(device, non_blocking=True)
        return self._replace(latents=latents, cond=cond, last=last, altered=altered)


def sample_names(batches: Sequence[Any]) -> list[str]:
    """The names of all samples of some batches, encoded or not; batches without names have none."""
    return [name for batch in batches for name in batch_field(batch, "names", ())]


def batch_field(batch: Any, name: str, default: Any) -> Any:
    """A field of a batch: a dict as the loader reads it, a TrainingBatch, or anything without fields."""
    return batch.get(name, default) if isinstance(batch, dict) else getattr(batch, name, default)


def clip_conditioning(model_type: str, batch_size: int, size: Size, fps: float | Tensor) -> dict[str, Tensor]:
    """The size conditioning of a model type for clips of `size` (T, H, W) at `fps` frames per second, on the CPU."""
    cond = size_conditioning(conditioning_kind(model_type), batch_size, size[1:], size[0], 1.0)
    if "fps" in cond and size[0] > 1:
        cond["fps"] = torch.as_tensor(fps, dtype=torch.float32).expand(batch_size)
    return cond


def encode_videos(vae: Any, video: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Latents [B, C, T', H / 8, W / 8] of `video` uint8 [B, 3, T, H, W]: the means of the posterior, float32."""
    levels = to_model_range(video.to(device, non_blocking=True)).to(dtype)
    return vae.encode(levels, sample=False).float()


def encode_texts(text_encoder: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """The text conditioning of captions: y [B, 1, L, C_text] and, if the encoder has one, its mask [B, L]."""
    y, mask = text_encoder.encode([preprocess(text) for text in texts])
    return {"y": y} if mask is None else {"y": y, "mask": mask}


class Encoders:
    """The frozen autoencoder and text encoder of a run.

    contents: the hashes of their weights and of the tokenizer, by name, for the fingerprint of the run
    """

    def __init__(self, settings: TrainSettings, device: torch.device, layout: RankLayout) -> None:
        self.settings, self.device = settings, device
        self.dtype = inference_dtype(device, settings.dtype)
        self.vae, vae = builder.load_component(settings.section("vae"), "vae", device, self.dtype, settings.offline)
        self.contents = {"weights of the vae": vae.sha256}
        self.text = self._load_text_encoder(settings.section("text_encoder"), layout)

    def _load_text_encoder(self, section: dict[str, Any], layout: RankLayout) -> Any:
        if section["type"] in WITHOUT_WEIGHTS:
            return builder.build_text_encoder(section, None, self.dtype)
        offline = self.settings.offline
        encoder, summary = builder.load_component(section, "text_encoder", self.device, self.dtype, offline, layout)
        self.contents["weights of the text encoder"] = summary.sha256
        self.contents |= builder.tokenizer_sha256(summary.path)
        return encoder

    def model_kwargs(self, sizes: list[Size]) -> dict[str, Any]:
        """Keyword arguments of a model that fits these encoders, with `input_size` if all clips have one size."""
        fitting: dict[str, Any] = {"in_channels": self.vae.out_channels}
        if len(set(sizes)) == 1:
            fitting["input_size"] = tuple(self.vae.get_latent_size(sizes[0]))
        if isinstance(self.text, ClassIds):
            return {**fitting, "condition": f"label_{self.text.num_classes}"}
        return {**fitting, "caption_channels": self.text.output_dim, "model_max_length": self.text.model_max_length}

    @torch.no_grad()
    def encode(self, batch: dict[str, Any]) -> TrainingBatch:
        """Encodes a batch of clips as `sources.TableSource` reads it; latents are the means of the posterior."""
        video, size = batch["video"], tuple(batch["size"])
        with training_context(self.device, self.settings.dtype):
            latents = encode_videos(self.vae, video, self.device, self.dtype)
            text = encode_texts(self.text, batch["text"])
        cond = {**text, **clip_conditioning(self.settings.model["type"], len(video), size, batch["fps"])}
        return TrainingBatch(latents, cond, size, batch["names"], weight=batch["weight"]).to(self.device)
