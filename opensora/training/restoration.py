"""Latents that a diffusion model restores from noise: decoders that learn from them stand the model's errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opensora.checkpoints import builder
from opensora.config.settings import TrainSettings
from opensora.datasets.synthetic.dataset import MixedClips
from opensora.pipeline.loaded_models import check_fit
from opensora.schedulers.common import per_sample
from opensora.schedulers.rf import RFLOW, add_noise
from opensora.training.data.batch import clip_conditioning, encode_texts
from opensora.training.data.clip_features import FPS
from opensora.training.losses.diffusion import drop_text

CLEAN = 0.25  # part of the clips whose latents stay as they are


class LatentRestorer:
    """The diffusion model `restorer` of the settings, which restores latents in one step of rectified flow.

    Each clip is noised to a random time below `restore_time`; its caption is dropped as often as in the model's own
    training. contents: the hashes of the weights, for the fingerprint of the run. Raises ConfigError for a model that
    does not fit the autoencoder `vae` or the text encoder.
    """

    def __init__(self, settings: TrainSettings, clips: MixedClips, vae: Any, device: torch.device) -> None:
        self.settings, self.clips, self.device = settings, clips, device
        self.section = settings.section("restorer")
        self.model, weights = self._load(self.section, "model")
        self.text_encoder, text_weights = self._load(settings.section("text_encoder"), "text_encoder")
        check_fit(self.model, vae, self.text_encoder)
        self.contents = {
            "weights of the restorer": weights.sha256,
            "weights of the text encoder": text_weights.sha256,
        }

    def _load(self, section: dict[str, Any], what: str) -> Any:
        return builder.load_component(section, what, self.device, torch.float32, self.settings.offline)

    @torch.no_grad()
    def __call__(self, step: int, z: Tensor, generator: torch.Generator) -> Tensor:
        """The latents `z` [B, C, T, H, W] of the clips of a step, noised and restored; a part of them as they are."""
        time = self.settings.restore_time * torch.rand(len(z), generator=generator)
        time = torch.where(torch.rand(len(z), generator=generator) < CLEAN, 0.0, time).to(z)
        noised = add_noise(z, torch.randn(z.shape, generator=generator).to(z), time)
        velocity = self.model(noised, time * RFLOW.num_timesteps, **self._conditioning(step, generator))
        return noised + per_sample(time) * velocity[:, : z.shape[1]].to(z)

    def _conditioning(self, step: int, generator: torch.Generator) -> dict[str, Any]:
        texts, clips = self.clips.texts(step), self.clips.of_step(step)
        size = (clips.num_frames, *(clips.crop or clips.image_size))
        fps = (self.settings.dataset or {}).get("fps", FPS)
        cond = encode_texts(self.text_encoder, texts) | clip_conditioning(self.section["type"], len(texts), size, fps)
        cond = {name: value.to(self.device) for name, value in cond.items()}
        return {**cond, "y": drop_text(self.model, cond["y"], generator)}
