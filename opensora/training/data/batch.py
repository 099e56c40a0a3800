"""What a training step learns from, and how the frozen encoders make it of videos and captions."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opensora.acceleration.device import inference_dtype, training_context
from opensora.checkpoints import builder
from opensora.config.settings import TrainSettings
from opensora.datasets.datasets import to_levels
from opensora.distributed.fsdp import Layout
from opensora.errors import ConfigError
from opensora.models.sizes import size_conditioning
from opensora.models.text_encoder.classes import ClassIds
from opensora.models.text_encoder.cleaning import preprocess

logger = logging.getLogger("opensora")


class Examples(NamedTuple):
    """One batch of clips, all of one size.

    latents: [B, C, T', H / 8, W / 8], as the model sees them
    cond: what the model is told: y [B, 1, L, C_text] and its mask [B, L] (or classes [B]), and sizes
    size: (T, H, W) in frames and pixels
    names: of the clips, for messages
    last: [B, C, H / 8, W / 8], the last frames as images, if it is known
    weight: of this batch; 0 when nothing of it could be read
    continued: whether the text is about the second half alone, what went before being given
    """

    latents: Tensor
    cond: dict[str, Tensor]
    size: tuple[int, int, int]
    names: list[str]
    last: Tensor | None = None
    weight: float = 1.0
    continued: bool = False

    def to(self, device: torch.device) -> Examples:
        """The same on a device."""
        last = None if self.last is None else self.last.to(device, non_blocking=True)
        cond = {name: value.to(device, non_blocking=True) for name, value in self.cond.items()}
        return self._replace(latents=self.latents.to(device, non_blocking=True), cond=cond, last=last)


def told_of(model_type: str, count: int, size: tuple[int, int, int], fps: float | Tensor) -> dict[str, Tensor]:
    """What a model is told of the size (T, H, W) of `count` clips and their frames per second, on the CPU."""
    kind = "PixArtMS" if model_type.startswith("PixArtMS") else "STDiT2"
    told = size_conditioning(kind, count, size[1:], size[0], 1.0)
    if "fps" in told and size[0] > 1:
        told["fps"] = torch.as_tensor(fps, dtype=torch.float32).expand(count)
    return told


class Encoders:
    """The frozen autoencoder and text encoder, and batches of videos and captions made into examples with them."""

    def __init__(self, settings: TrainSettings, device: torch.device, layout: Layout) -> None:
        for name in ("vae", "text_encoder"):
            if getattr(settings, name) is None:
                raise ConfigError(f"training a diffusion model needs a section {name}")
        self.settings, self.device = settings, device
        self.dtype = inference_dtype(device, settings.dtype)
        how = (device, self.dtype, settings.offline)
        self.vae, vae = builder.load_component(settings.vae, "vae", *how)
        self.contents = {"weights of the vae": vae.sha256}
        self.text = self._text_encoder(settings.text_encoder, how, layout)

    def _text_encoder(self, section: dict[str, Any], how: tuple[Any, ...], layout: Layout) -> Any:
        if section["type"] in builder.WITHOUT_WEIGHTS:
            return builder.build_text_encoder(section, None, self.dtype)
        encoder, summary = builder.load_component(section, "text_encoder", *how, layout)
        self.contents["weights of the text encoder"] = summary.sha256
        self.contents |= builder.tokenizer_sha256(summary.path)
        return encoder

    def keywords(self, sizes: list[tuple[int, int, int]]) -> dict[str, Any]:
        """The keywords of a model that fits these encoders, with `input_size` if all clips have one size (T, H, W)."""
        fitting: dict[str, Any] = {"in_channels": self.vae.out_channels}
        if len(set(sizes)) == 1:
            fitting["input_size"] = tuple(self.vae.get_latent_size(sizes[0]))
        if isinstance(self.text, ClassIds):
            return {**fitting, "condition": f"label_{self.text.num_classes}"}
        return {**fitting, "caption_channels": self.text.output_dim, "model_max_length": self.text.model_max_length}

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any], generator: torch.Generator) -> Examples:
        """Examples of a batch of clips as `sources.TableSource` reads them; latents are the posterior's means."""
        video, (frames, height, width) = batch["video"], batch["size"]
        with training_context(self.device, self.settings.dtype):
            levels = to_levels(video.to(self.device, non_blocking=True)).to(self.dtype)
            latents = self.vae.encode(levels, sample=False).float()
            y, mask = self.text.encode([preprocess(text) for text in batch["text"]])
        told = told_of(self.settings.model["type"], len(video), (frames, height, width), batch["fps"])
        cond = {"y": y, **({} if mask is None else {"mask": mask}), **told}
        size = (frames, height, width)
        return Examples(latents, cond, size, batch["names"], weight=batch["weight"]).to(self.device)
