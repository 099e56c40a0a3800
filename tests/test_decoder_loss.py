"""The loss of an autoencoder's decoders alone: noise on latents, batches, clips that repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opensora.checkpoints.fit import load_weights
from opensora.config.settings import TrainSettings
from opensora.errors import ConfigError
from opensora.models.vae.vae import VideoAutoencoderPipeline
from opensora.training.autoencoder import train_vae
from opensora.training.losses.autoencoder import add_random_noise, decoder_loss
from tests.tiny import TINY_VAE, make_tiny_vae


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model(tmp_path: Path) -> VideoAutoencoderPipeline:
    model = VideoAutoencoderPipeline(**TINY_VAE)
    load_weights(model, make_tiny_vae(tmp_path / "vae"))
    return model.eval()


def settings(**given: Any) -> TrainSettings:
    return TrainSettings(**{"model": dict(type="VideoAutoencoderPipeline"), "freeze_encoders": True, **given})


class TestNoise:
    def test_each_clip_has_a_deviation_below_the_largest(self) -> None:
        z = torch.zeros(64, 4, 5, 16, 16)
        deviations = add_random_noise(z, 0.3, seeded()).std(dim=(1, 2, 3, 4))
        assert 0 < deviations.min() < 0.03 and 0.27 < deviations.max() < 0.31
        assert deviations.mean() == pytest.approx(0.15, abs=0.03)

    def test_none_leaves_latents_as_they_are(self) -> None:
        z = torch.randn(2, 4, 5, 2, 2)
        assert add_random_noise(z, 0.0, seeded()) is z

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_keeps_shape_and_type(self, dtype: torch.dtype) -> None:
        z = torch.zeros(3, 8, 1, 2, 5, dtype=dtype)
        noised = add_random_noise(z, 1.0, seeded())
        assert noised.shape == z.shape and noised.dtype == dtype and noised.any()

    def test_it_changes_what_is_trained_and_no_encoder(self, tmp_path: Path) -> None:
        start = make_tiny_vae(tmp_path / "start")
        section = dict(type="VideoAutoencoderPipeline", from_pretrained=str(start), **TINY_VAE)
        clips = dict(type="ShapeClips", num_frames=5, image_size=(16, 16), num_clips=4)
        trained = []
        for noise in (0.0, 0.5, 0.5):
            given = dict(outputs=str(tmp_path / "runs"), model=section, dataset=clips, latent_noise=noise, max_steps=2)
            given |= dict(batch_size=2, dtype="fp32", device="cpu", perceptual_loss_weight=0.0)
            trained.append(load_file(train_vae(settings(**given)).path / "model.safetensors"))
        without, one, other = trained
        changed = {name for name in one if not torch.equal(one[name], without[name])}
        assert changed and all(".decoder." in name or ".post_quant_conv." in name for name in changed)
        assert all(torch.equal(one[name], other[name]) for name in one)

    @pytest.mark.parametrize("noise", [-0.1, float("nan"), "much"])
    def test_wrong_deviations_are_refused(self, noise: Any) -> None:
        with pytest.raises(ConfigError, match="latent_noise"):
            model = dict(type="VideoAutoencoderPipeline")
            TrainSettings.from_config({"model": model, "freeze_encoders": True, "latent_noise": noise}, "config.py")


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_clips_count_by_their_root_mean_square(model: VideoAutoencoderPipeline, frames: int) -> None:
    """The worst clip of a batch counts more than the others."""
    videos = torch.randn(3, 3, frames, 16, 16, generator=seeded(1)) * torch.tensor([0.1, 0.5, 2.0]).view(3, 1, 1, 1, 1)

    def loss(x: Tensor) -> Tensor:
        return decoder_loss(model, settings(), lambda step: x, None)(0, seeded())

    alone = torch.stack([loss(video[None]) for video in videos])
    torch.testing.assert_close(loss(videos), alone.square().mean().sqrt())
    assert loss(videos) > alone.mean()


@pytest.mark.parametrize(("period", "encoded"), [(None, 6), (2, 2), (3, 3)])
def test_clips_that_repeat_are_encoded_once(
    model: VideoAutoencoderPipeline, monkeypatch: pytest.MonkeyPatch, period: int | None, encoded: int
) -> None:
    whole = []
    encode = model.spatial_vae.encode

    def count(x: Tensor, sample: bool = True) -> Tensor:
        if not x.requires_grad and x.shape[2] == 5:
            whole.append(x)
        return encode(x, sample=sample)

    monkeypatch.setattr(model.spatial_vae, "encode", count)
    clips = [torch.randn(1, 3, 5, 16, 16, generator=seeded(n)) for n in range(period or 6)]
    loss = decoder_loss(model, settings(latent_noise=0.1), lambda step: clips[step % len(clips)], period)
    losses = [loss(step, seeded()).item() for step in range(6)]
    assert len(whole) == encoded
    if period:
        assert losses[period:] == losses[: 6 - period]
