"""Training on noised latents that lean to another color or shape, which the model must correct."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opensora.config.settings import TrainSettings
from opensora.datasets.synthetic.dataset import rendered_clips
from opensora.datasets.synthetic.measure import measure
from opensora.datasets.synthetic.render import HELD_OUT, TRAINED, alter_scene, draw_scene, make_altered_clip, make_clip
from opensora.errors import ConfigError, OpenSoraError
from opensora.schedulers.common import per_sample
from opensora.schedulers.rf import RFLOW, add_noise
from opensora.training.autoencoder import train_vae
from opensora.training.data.batch import TrainingBatch
from opensora.training.diffusion import train
from opensora.training.losses.diffusion import DiffusionLoss
from opensora.training.losses.perturbation import WEIGHTS, InputPerturbation, draw_weights, typical_size
from tests.full import count
from tests.tiny import TINY_STDIT3, TINY_VAE, make_tiny_t5, make_tiny_vae

SHAPE = (4, 8, 5, 3, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


class TestAlteredScenes:
    @pytest.mark.parametrize("held_out", [False, True])
    def test_only_color_or_shape_change_to_a_trained_combination(self, held_out: bool) -> None:
        for number in range(count(200, 2000)):
            rng = np.random.default_rng(number)
            scene = draw_scene(rng, 64, 64, held_out)
            altered = alter_scene(rng, scene)
            assert altered._replace(shape=scene.shape, colour=scene.colour) == scene != altered
            assert (altered.shape, altered.colour, altered.motion) in TRAINED

    def test_colors_change_most_often_and_to_similar_ones(self) -> None:
        rng = np.random.default_rng(0)
        scene = draw_scene(rng, 64, 64)._replace(shape="circle", colour="white", motion="growing")
        assert not any((shape, motion) == ("circle", "growing") for shape, _, motion in HELD_OUT)
        changed = [alter_scene(rng, scene) for _ in range(1000)]
        kinds = Counter((one.shape == "circle", one.colour == "white") for one in changed)
        assert kinds[True, False] == pytest.approx(800, abs=60)
        assert kinds[False, True] == pytest.approx(100, abs=40)
        colors = Counter(one.colour for one in changed)
        assert min(colors["yellow"], colors["cyan"]) > 1.6 * max(colors["red"], colors["green"])

    @pytest.mark.parametrize(("frames", "height", "width"), [(17, 64, 64), (34, 48, 80), (17, 80, 48)])
    def test_a_clip_keeps_its_motion_and_background(self, frames: int, height: int, width: int) -> None:
        for index in range(6):
            right = measure(make_clip(3, index, frames, height, width).video)
            wrong = measure(make_altered_clip(3, index, frames, height, width))
            assert (wrong.motion, wrong.background) == (right.motion, right.background)
            assert (wrong.shape, wrong.colour) != (right.shape, right.colour)

    def test_a_set_alters_its_own_clips(self) -> None:
        section = {"type": "ShapeClips", "sizes": [(17, 16, 16, 1)], "continued": [(34, 16, 16, 1)], "num_clips": 5}
        plain, continued = rendered_clips(section, 2, 9).sets
        assert np.array_equal(plain.altered(7), make_altered_clip(9, 2, 17, 16, 16))
        assert plain.alterable and not continued.alterable, "its caption tells its second half alone"


class TestLoss:
    @pytest.mark.parametrize("time", [0.05, 0.4, 0.999])
    def test_the_right_velocity_leads_to_the_right_data(self, time: float) -> None:
        x, error, times = noise(1), noise(2), torch.full((4,), time)

        def model(x_t: Tensor, timestep: Tensor) -> Tensor:
            return (x - x_t) / per_sample(timestep / 1000)

        flow = RFLOW()
        loss = flow.training_loss(model, x, {}, noise=noise(3), time=times, perturb=lambda _: error)
        torch.testing.assert_close(loss, torch.zeros(4), atol=1e-6, rtol=0)

    def test_the_model_gets_the_noised_errors(self) -> None:
        x, error, times, seen = noise(1), noise(2), torch.tensor([0.1, 0.3, 0.6, 0.9]), []

        def model(x_t: Tensor, timestep: Tensor, x_mask: Tensor) -> Tensor:
            seen.append(x_t)
            return x_t

        mask = torch.tensor([[False, True, True, True, True]]).expand(4, 5)
        RFLOW().training_loss(model, x, {}, noise=noise(3), time=times, mask=mask, perturb=lambda _: error)
        assert torch.equal(seen[0][:, :, :1], x[:, :, :1]), "given frames stay right"
        torch.testing.assert_close(seen[0][:, :, 1:], add_noise(x + error, noise(3), times)[:, :, 1:])

    def test_times_near_the_data_are_kept_finite(self) -> None:
        flow, times = RFLOW(), torch.zeros(4)
        loss = flow.training_loss(
            lambda x, timestep: x, noise(1), {}, noise=noise(2), time=times, perturb=lambda time: per_sample(time)
        )
        assert loss.isfinite().all()

    def test_no_errors_are_no_difference(self) -> None:
        flow, x, times = RFLOW(), noise(1), torch.tensor([0.1, 0.3, 0.6, 0.9])
        given = dict(noise=noise(2), time=times)
        plain = flow.training_loss(lambda x, timestep: 0.5 * x, x, {}, **given)
        same = flow.training_loss(lambda x, timestep: 0.5 * x, x, {}, perturb=lambda _: torch.zeros(SHAPE), **given)
        torch.testing.assert_close(plain, same, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("given", [dict(altered=None), dict(continued=True, altered=None)])
    def test_batches_without_altered_clips_are_trained_as_ever(self, given: dict[str, Any]) -> None:
        class Model(torch.nn.Module):
            class_dropout_prob = 0.0

            def forward(self, x: Tensor, timestep: Tensor, **cond: Any) -> Tensor:
                return 0.5 * x

        batch = TrainingBatch(noise(1), {"y": noise(2, (4, 1, 3, 8))}, (17, 24, 32), list("abcd"), altered=noise(3))
        losses = [DiffusionLoss(Model(), RFLOW(), None, part) for part in (0.0, 1.0)]
        plain, with_it = (loss(batch._replace(**given), seeded()) for loss in losses)
        assert torch.equal(plain, with_it)
        assert not torch.equal(losses[0](batch, seeded()), losses[1](batch, seeded()))


class TestPerturbation:
    def test_a_part_of_the_samples_moves_towards_the_altered_ones(self) -> None:
        x, altered = torch.zeros(400, 8, 5, 2, 2), torch.ones(400, 8, 5, 2, 2)
        errors = InputPerturbation(x, altered, 0.3, seeded())(torch.full((400,), 0.5))
        chosen = errors.flatten(1).abs().amax(dim=1) > 0
        assert chosen.float().mean().item() == pytest.approx(0.3, abs=0.08)
        assert errors.min().item() < -0.3 and errors.max().item() > 0.8
        assert (errors[:, :1] == errors).all(), "a weight is the same in all channels"

    @pytest.mark.parametrize("size", [0.01, 0.3, 5.0])
    def test_errors_are_no_larger_than_the_noise(self, size: float) -> None:
        difference = size * torch.sign(noise(1))
        for time in (0.02, 0.2, 0.5, 0.9, 1.0):
            errors = InputPerturbation(noise(2), noise(2) + difference, 1.0, seeded())(torch.full((4,), time))
            limit = min(time / max(1 - time, 1e-3), 2 * size)
            assert errors.isfinite().all() and errors.abs().max().item() <= 1.001 * limit

    def test_the_size_counts_only_where_clips_differ(self) -> None:
        difference = torch.zeros(2, 8, 5, 8, 8)
        difference[:, :, :, 3:5, 3:5] = torch.tensor([0.5, 2.0]).view(2, 1, 1, 1, 1)
        torch.testing.assert_close(typical_size(difference), torch.tensor([0.5, 2.0]))
        assert (typical_size(torch.zeros(2, 8, 5, 8, 8)) > 0).all()

    @pytest.mark.parametrize("shape", [(64, 8, 1, 6, 10), (64, 4, 10, 3, 5)])
    def test_weights_stay_in_their_range_and_change_over_the_clip(self, shape: tuple[int, ...]) -> None:
        weights = draw_weights(torch.Size(shape), seeded())
        assert weights.shape == (shape[0], 1, *shape[2:])
        assert weights.min().item() >= WEIGHTS[0] and weights.max().item() <= WEIGHTS[1]
        assert (weights.flatten(1).std(dim=1) > 0).all()


class TestTraining:
    def given(self, tmp_path: Path, **more: Any) -> TrainSettings:
        vae, t5 = make_tiny_vae(tmp_path / "vae"), make_tiny_t5(tmp_path / "t5")
        clips = dict(type="ShapeClips", sizes=[(17, 16, 16, 1)], num_clips=4, features=str(tmp_path / "features"))
        base: dict[str, Any] = dict(
            outputs=str(tmp_path / "runs"), model=dict(type="STDiT3", **TINY_STDIT3), dataset=clips,
            vae=dict(type="VideoAutoencoderPipeline", from_pretrained=str(vae), **TINY_VAE),
            text_encoder=dict(type="t5", from_pretrained=str(t5), model_max_length=16),
            scheduler=dict(type="rflow"), batch_size=2, max_steps=3, lr=1e-2, dtype="fp32", device="cpu",
            tensorboard=False, input_perturbation=1.0, ema_decay=0.0,
        )  # fmt: skip
        return TrainSettings(**{**base, **more})

    def test_a_run_learns_other_weights_and_can_be_repeated(self, tmp_path: Path) -> None:
        one, again = (load_file(train(self.given(tmp_path)).path / "model.safetensors") for _ in range(2))
        assert all(torch.equal(one[name], again[name]) for name in one)
        shard = load_file(next((tmp_path / "features" / "17x16x16").glob("*.safetensors")))
        assert shard["altered"].shape == shard["latents"].shape and not torch.equal(shard["altered"], shard["latents"])
        sections = dict(self.given(tmp_path).dataset or {}, features=str(tmp_path / "plain"))
        plain = train(self.given(tmp_path, input_perturbation=0.0, dataset=sections)).path / "model.safetensors"
        assert any(not torch.equal(one[name], tensor) for name, tensor in load_file(plain).items())
        assert "altered" not in json.loads((tmp_path / "plain/17x16x16/features.json").read_text())["tensors"]

    def test_features_without_altered_clips_are_refused(self, tmp_path: Path) -> None:
        train(self.given(tmp_path, input_perturbation=0.0))
        with pytest.raises(ConfigError, match="was encoded with another tensors; remove it or name another"):
            train(self.given(tmp_path))

    def test_a_run_resumes_only_with_the_same_share(self, tmp_path: Path) -> None:
        run = train(self.given(tmp_path)).folder
        with pytest.raises(OpenSoraError, match="input_perturbation"):
            train(self.given(tmp_path, input_perturbation=0.5, load=str(run), max_steps=4))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (dict(scheduler=dict(type="iddpm")), "input_perturbation is for rectified flow"),
            (dict(dataset=dict(type="WorldClips", num_clips=4)), "dataset type 'ShapeClips', not of 'WorldClips'"),
            (dict(dataset=dict(type="VideoTextDataset", data_path="t.csv")), "not of 'VideoTextDataset'"),
            (dict(dataset=None), "dataset type 'ShapeClips', not of 'None'"),
        ],
    )
    def test_what_cannot_be_altered_is_refused(self, tmp_path: Path, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            train(self.given(tmp_path, **given))
        assert not (tmp_path / "runs").exists()

    def test_autoencoders_refuse_it(self) -> None:
        with pytest.raises(ConfigError, match="input_perturbation is for training diffusion models"):
            train_vae(TrainSettings(model=dict(type="VideoAutoencoderPipeline"), input_perturbation=0.5))

    @pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "half"])
    def test_wrong_shares_are_refused(self, share: Any) -> None:
        with pytest.raises(ConfigError, match="input_perturbation"):
            TrainSettings.from_config({"model": dict(type="STDiT3"), "input_perturbation": share}, "config.py")
