"""Decoders that learn from the latents that a diffusion model restores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opensora.checkpoints import builder
from opensora.config.settings import TrainSettings
from opensora.datasets.synthetic.dataset import rendered_clips
from opensora.errors import ConfigError, OpenSoraError
from opensora.training.autoencoder import train_vae
from opensora.training.data.batch import clip_conditioning
from opensora.training.restoration import LatentRestorer
from tests.tiny import TINY_VAE, make_tiny_stdit3, make_tiny_t5, make_tiny_vae

CLIPS = dict(type="ShapeClips", num_frames=17, image_size=(16, 16), num_clips=8)
CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(**given: Any) -> TrainSettings:
    section: dict[str, Any] = dict(type="STDiT3", from_pretrained="restorer")
    base = dict(
        model=dict(type="VideoAutoencoderPipeline"), dataset=CLIPS, restorer=section, text_encoder=dict(type="t5")
    )
    return TrainSettings(**{**base, "freeze_encoders": True, "batch_size": 4, **given})


class Denoiser:
    """Knows the clean latents `z`: its velocities lead back to them. Remembers what it was called with."""

    class_dropout_prob = 0.0

    def __init__(self, z: Tensor) -> None:
        self.z, self.in_channels, self.calls = z, z.shape[1], []
        self.config = {"caption_channels": 8}

    def __call__(self, x: Tensor, timestep: Tensor, **cond: Any) -> Tensor:
        self.calls.append((x, timestep, cond))
        time = (timestep / 1000).clamp(min=1e-9).view(-1, 1, 1, 1, 1)
        velocity = (self.z - x) / time
        return torch.cat((velocity, torch.full_like(velocity, 1e6)), dim=1)  # the second half is a variance


class TextEncoder:
    output_dim = 8

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        self.seen += texts
        return torch.zeros(len(texts), 1, 3, 8), torch.ones(len(texts), 3)


def make_restorer(monkeypatch: pytest.MonkeyPatch, z: Tensor, **given: Any) -> LatentRestorer:
    parts = {"model": Denoiser(z), "text_encoder": TextEncoder()}
    monkeypatch.setattr(builder, "load_component", lambda _, what, *more: (parts[what], SimpleNamespace(sha256=what)))
    wanted = settings(**given)
    vae = SimpleNamespace(out_channels=z.shape[1])
    return LatentRestorer(wanted, rendered_clips(wanted.dataset, wanted.batch_size or 1, wanted.seed), vae, CPU)


@pytest.mark.parametrize("shape", [(4, 8, 5, 2, 2), (4, 4, 1, 6, 10), (4, 8, 10, 3, 5)])
def test_the_right_velocity_leads_back_to_the_latents(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, generator=seeded(1))
    torch.testing.assert_close(make_restorer(monkeypatch, z)(0, z, seeded()), z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("most", [0.1, 0.45, 1.0])
def test_times_lie_below_the_largest_and_some_are_zero(monkeypatch: pytest.MonkeyPatch, most: float) -> None:
    z = torch.randn(4, 4, 5, 2, 2, generator=seeded(1))
    restorer = make_restorer(monkeypatch, z, restore_time=most)
    for step in range(40):
        restorer(step, z, seeded(step))
    times = torch.cat([timestep for _, timestep, _ in restorer.model.calls]) / 1000
    assert 0.8 * most < times.max() < most and times.min() == 0
    assert 0.1 < (times == 0).float().mean() < 0.4
    clean = torch.cat([(x - z).flatten(1).abs().amax(dim=1) == 0 for x, *_ in restorer.model.calls])
    assert torch.equal(clean, times == 0)


@pytest.mark.parametrize(("step", "size"), [(0, (17, 16, 16)), (3, (1, 16, 32)), (5, (34, 24, 16))])
def test_the_model_gets_captions_and_sizes_of_the_step(
    monkeypatch: pytest.MonkeyPatch, step: int, size: tuple[int, int, int]
) -> None:
    z = torch.randn(4, 4, 5, 2, 2)
    clips = dict(type="ShapeClips", num_frames=size[0], image_size=size[1:], num_clips=8, fps=12)
    restorer = make_restorer(monkeypatch, z, dataset=clips)
    restorer(step, z, seeded())
    one = restorer.clips.sets[0]
    first = step % 2 * 4  # 8 clips repeat after 2 steps of 4
    assert restorer.text_encoder.seen == [one.clip(index).text for index in range(first, first + 4)]
    cond = restorer.model.calls[0][2]
    assert cond["height"].tolist() == [size[1]] * 4 and cond["width"].tolist() == [size[2]] * 4
    assert torch.equal(cond["fps"], clip_conditioning("STDiT3", 4, size, 12)["fps"])
    assert (cond["fps"] == 12).all() == (size[0] > 1)


def test_a_cropped_clip_has_the_size_of_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(4, 4, 5, 1, 2)
    restorer = make_restorer(monkeypatch, z, dataset={**CLIPS, "image_size": (32, 32), "crop": (8, 16)})
    restorer(0, z, seeded())
    cond = restorer.model.calls[0][2]
    assert (cond["height"][0], cond["width"][0]) == (8, 16)


class TestTraining:
    def given(self, tmp_path: Path, **more: Any) -> dict[str, Any]:
        folders = {"vae": make_tiny_vae, "dit": make_tiny_stdit3, "t5": make_tiny_t5}
        vae, dit, t5 = (str(make(tmp_path / name)) for name, make in folders.items())
        return dict(
            outputs=str(tmp_path / "runs"),
            model=dict(type="VideoAutoencoderPipeline", from_pretrained=vae, **TINY_VAE),
            restorer=dict(type="STDiT3", from_pretrained=dit), dataset={**CLIPS, "num_clips": 4}, batch_size=2,
            text_encoder=dict(type="t5", from_pretrained=t5, model_max_length=16),
            dtype="fp32", device="cpu", perceptual_loss_weight=0.0, max_steps=2, **more,
        )  # fmt: skip

    def test_decoders_learn_other_weights_and_encoders_stay(self, tmp_path: Path) -> None:
        start = load_file(make_tiny_vae(tmp_path / "start") / "model.safetensors")
        given = self.given(tmp_path)
        with_it, again = (load_file(train_vae(settings(**given)).path / "model.safetensors") for _ in range(2))
        without = load_file(train_vae(settings(**{**given, "restorer": None})).path / "model.safetensors")
        changed = {name for name in with_it if not torch.equal(with_it[name], without[name])}
        assert changed and all(".decoder." in name or ".post_quant_conv." in name for name in changed)
        assert all(torch.equal(with_it[name], again[name]) for name in with_it)
        assert all(torch.equal(with_it[name], start[name]) for name in start if ".encoder." in name)

    def test_a_run_resumes_only_with_the_same_restorer(self, tmp_path: Path) -> None:
        given = self.given(tmp_path)
        run = train_vae(settings(**given)).folder
        other = str(make_tiny_stdit3(tmp_path / "other", seed=5))
        given |= dict(restorer=dict(type="STDiT3", from_pretrained=other), load=str(run), max_steps=3)
        with pytest.raises(OpenSoraError, match="restorer"):
            train_vae(settings(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(freeze_encoders=False), "freeze_encoders=True"),
        (dict(mixed_strategy="mixed_video_image"), "mixed_strategy cuts them"),
        (dict(text_encoder=None), "text_encoder"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    wanted = settings(**{**TestTraining().given(tmp_path), **given})
    with pytest.raises(ConfigError, match=message):
        train_vae(wanted)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [({"in_channels": 8}, "8 latent channels"), ({"caption_channels": 16}, "16 text channels")],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, part: dict[str, int], message: str) -> None:
    other = str(make_tiny_stdit3(tmp_path / "other", **part))
    wanted = settings(**{**TestTraining().given(tmp_path), "restorer": dict(type="STDiT3", from_pretrained=other)})
    with pytest.raises(ConfigError, match=message):
        train_vae(wanted)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("time", [-0.1, 1.5, float("nan"), "late"])
def test_wrong_times_are_refused(time: Any) -> None:
    with pytest.raises(ConfigError, match="restore_time"):
        model = dict(type="VideoAutoencoderPipeline")
        TrainSettings.from_config({"model": model, "freeze_encoders": True, "restore_time": time}, "config.py")


@pytest.mark.parametrize("kind", ["VideoAutoencoderPipeline", "t5", "nothing"])
def test_other_components_are_refused(kind: str) -> None:
    config = {"model": dict(type="VideoAutoencoderPipeline"), "freeze_encoders": True, "restorer": dict(type=kind)}
    with pytest.raises(ConfigError, match="restorer type"):
        TrainSettings.from_config(config, "config.py")
