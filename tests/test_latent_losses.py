"""The losses that give latents colors of their own and equal variances, and the weights of frames by contrast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.config.settings import TrainSettings, check_trainable
from opensora.errors import ConfigError
from opensora.models.vae.vae import VideoAutoencoderPipeline
from opensora.training.autoencoder import train_vae
from opensora.training.diffusion import train
from opensora.training.losses.autoencoder import PixelLoss, contrast_weights
from opensora.training.losses.latents import ColorLoss, mean_colors, statistics_loss
from tests.tiny import TINY_VAE


@pytest.fixture
def model() -> VideoAutoencoderPipeline:
    return VideoAutoencoderPipeline(**TINY_VAE)


def settings(**given: Any) -> TrainSettings:
    return TrainSettings(**{"model": dict(type="VideoAutoencoderPipeline"), **given})


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestMeanColors:
    @pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
    def test_each_latent_has_the_mean_of_its_pixels(self, model: VideoAutoencoderPipeline, frames: int) -> None:
        """Frames are counted from the end: the first latent stands for what is over."""
        x = noise(2, 3, frames, 16, 24)
        colors = mean_colors(x, model)
        assert list(colors.shape[2:]) == model.get_latent_size((frames, 16, 24))
        factor = model.temporal_vae.time_downsample_factor
        for latent in range(colors.shape[2]):
            end = frames - (colors.shape[2] - 1 - latent) * factor
            pixels = x[:, :, max(end - factor, 0) : end, 8:16, 16:24]
            torch.testing.assert_close(colors[:, :, latent, 1, 2], pixels.mean(dim=(2, 3, 4)))

    def test_chunks_are_independent(self, model: VideoAutoencoderPipeline) -> None:
        chunk = model.micro_frame_size
        assert chunk
        x = noise(1, 3, chunk + 3, 8, 8)
        parts = [mean_colors(part, model) for part in (x[:, :, :chunk], x[:, :, chunk:])]
        assert torch.equal(mean_colors(x, model), torch.cat(parts, dim=2))


class TestColorLoss:
    def test_it_is_zero_for_whitened_colors_alone(self, model: VideoAutoencoderPipeline) -> None:
        mixed = torch.einsum("ij,bjthw->bithw", torch.tensor([[1.0, 0.5, 0.2], [0.0, 1.0, 0.7], [0.0, 0.0, 1.0]]),
                             noise(8, 3, 5, 32, 32) + 2.0)  # fmt: skip
        loss = ColorLoss([mixed[:4], mixed[4:]], model)
        colors = mean_colors(mixed, model) - loss.mean.view(1, 3, 1, 1, 1)
        z = torch.cat([torch.einsum("ij,bjthw->bithw", loss.whitening, colors), noise(*colors.shape)], dim=1)
        assert loss(z, mixed) < 1e-10
        assert statistics_loss(z[:, :3]) < 1e-4  # equal variances, no correlation
        assert loss(z + 0.5, mixed).item() == pytest.approx(0.25, rel=1e-4)

    def test_colors_that_never_vary_stay_finite(self, model: VideoAutoencoderPipeline) -> None:
        gray = noise(4, 1, 5, 16, 16).expand(-1, 3, -1, -1, -1)
        loss = ColorLoss([gray], model)
        assert torch.isfinite(loss(torch.zeros(4, 8, 2, 2, 2), gray))
        black = torch.zeros_like(gray)
        assert ColorLoss([black], model)(torch.zeros(4, 8, 2, 2, 2), black) == 0


class TestStatistics:
    def test_white_channels_cost_next_to_nothing(self) -> None:
        assert statistics_loss(noise(8, 6, 5, 32, 32)) < 1e-3

    @pytest.mark.parametrize("change", ["shift", "scale", "correlation"])
    def test_each_departure_costs(self, change: str) -> None:
        z = noise(8, 6, 5, 32, 32)
        changed = {"shift": z + 0.3, "scale": 1.3 * z, "correlation": z + 0.0}[change]
        if change == "correlation":
            changed[:, 1] = 0.8 * z[:, 0] + 0.6 * z[:, 1]
        assert statistics_loss(changed) > 0.03

    def test_constant_channels_have_a_finite_gradient(self) -> None:
        z = torch.zeros(2, 3, 4, requires_grad=True)
        statistics_loss(z).backward()
        assert z.grad is not None and torch.isfinite(z.grad).all()


class TestContrast:
    def test_low_contrast_and_small_objects_weigh_more(self) -> None:
        x = torch.full((1, 3, 4, 16, 16), -0.5)
        x[:, :, 0, :8, :7] = 1.0  # large and bright
        x[:, :, 1, :4, :4] = 1.0  # small
        x[:, :, 2, :8, :7] = -0.3  # faint
        large, small, faint, empty = contrast_weights(x)[0].tolist()
        assert large < small < faint <= empty == 4.0
        torch.testing.assert_close(contrast_weights(x, 2.0), contrast_weights(x).square())

    @pytest.mark.parametrize("power", [0.0, 1.0, 1.75])
    def test_pixel_errors_and_changes(self, power: float) -> None:
        loss = PixelLoss(settings(contrast_weighting=power))
        x = noise(3, 3, 4, 8, 8)
        weights = contrast_weights(x, power)
        torch.testing.assert_close(loss(x + 0.5, x), 0.75 * weights.mean(dim=1))
        torch.testing.assert_close(loss.changes(x + 0.5, x), torch.zeros(3), atol=1e-6, rtol=0)
        ramp = x + 0.5 * torch.arange(4).view(1, 1, 4, 1, 1)
        torch.testing.assert_close(loss.changes(ramp, x), 0.75 * weights[:, 1:].mean(dim=1))
        assert torch.equal(loss.changes(x[:, :, :1], x[:, :, :1] + 1), torch.zeros(3))


CLIPS = dict(type="ShapeClips", num_frames=5, image_size=(16, 16), num_clips=4)


@pytest.mark.parametrize("name", ["mean_color_loss_weight", "latent_statistics_loss_weight", "latent_noise"])
class TestTraining:
    def test_each_changes_the_encoder(self, name: str, tmp_path: Path) -> None:
        given: dict[str, Any] = dict(
            model=dict(type="VideoAutoencoderPipeline", freeze_vae_2d=True, **TINY_VAE), dataset=CLIPS, max_steps=2,
            use_z_rec_loss=True, perceptual_loss_weight=0.0, batch_size=2, dtype="fp32", device="cpu", lr=1e-2,
        )  # fmt: skip
        files = []
        for number, value in enumerate((0.0, 0.5, 0.5)):
            run = settings(**given, outputs=str(tmp_path / str(number)), **{name: value})
            files.append((train_vae(run).path / "model.safetensors").read_bytes())
        assert files[0] != files[1] == files[2]

    def test_decoders_alone_take_only_noise(self, name: str, tmp_path: Path) -> None:
        given = settings(**{name: 0.5}, use_z_rec_loss=True, freeze_encoders=True, outputs=str(tmp_path / "runs"))
        if name == "latent_noise":
            check_trainable(given)
            return
        with pytest.raises(ConfigError, match=f"^{name} is for training temporal encoders"):
            check_trainable(given)

    @pytest.mark.parametrize("start", [train, train_vae])
    @pytest.mark.parametrize("value", [0.5, 3])
    def test_it_is_refused_where_it_has_no_effect(self, name: str, start: Any, value: float, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=f"^{name} is for training temporal"):
            start(settings(**{name: value}, outputs=str(tmp_path / "runs")))
        assert not (tmp_path / "runs").exists()
