"""Validation gives the same numbers for the same weights, tells times and buckets apart, and disturbs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from opensora.config.settings import TrainSettings
from opensora.datasets.video import read_video
from opensora.models.stdit.stdit3 import STDiT3
from opensora.models.vae.vae import VideoAutoencoderPipeline
from opensora.schedulers.iddpm import IDDPM
from opensora.schedulers.iddpm_speed import IDDPM_SPEED
from opensora.schedulers.rf import RFLOW
from opensora.training.data.batch import TrainingBatch, clip_conditioning
from opensora.training.ema import EMA
from opensora.training.tracking import Tracker
from opensora.training.validation import BINS, Prompt, Samples, Validation, inference_mode, report
from tests.full import some
from tests.ranks import run
from tests.tiny import TINY_STDIT3, TINY_VAE

SIZES = {"144p 17f 1:1": (17, 32, 32), "144p 1f 3:4": (1, 48, 32)}
SCHEDULERS = {
    "rflow": RFLOW(use_timestep_transform=True), "iddpm": IDDPM(num_sampling_steps=50), "speed": IDDPM_SPEED(),
}  # fmt: skip


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(model={"type": "STDiT3"}, **{"dtype": "fp32", **changes})


def latent_size(size: tuple[int, int, int]) -> tuple[int, int, int]:
    return (size[0] // 17 * 5 or 1, size[1] // 8, size[2] // 8)


def conditions(count: int, size: tuple[int, int, int], seed: int = 0) -> dict[str, Tensor]:
    y = torch.randn(count, 1, 4, 32, generator=torch.Generator().manual_seed(seed))
    return {"y": y, **clip_conditioning("STDiT3", count, size, 24.0)}


def examples(name: str, count: int, seed: int = 0) -> TrainingBatch:
    size, source = SIZES[name], torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 4, *latent_size(size), generator=source)
    return TrainingBatch(latents, conditions(count, size, seed), size, [f"{name} {row}" for row in range(count)])


def batches() -> list[tuple[str, TrainingBatch]]:
    first, second = SIZES
    return [(first, examples(first, 2)), (second, examples(second, 3)), (first, examples(first, 1, seed=1))]


def tiny(**changes: Any) -> STDiT3:
    torch.manual_seed(0)
    model = STDiT3(**TINY_STDIT3, **changes)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def move(model: nn.Module) -> None:
    """Changes what is trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05)


class Zero(nn.Module):
    """Gives zeros, and keeps the timesteps that it is told."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.weight, self.channels = nn.Parameter(torch.zeros(1)), channels
        self.seen: list[float] = []

    def forward(self, x: Tensor, timestep: Tensor, **_: Tensor) -> Tensor:
        self.seen += timestep.tolist()
        return x.new_zeros(len(x), self.channels, *x.shape[2:])


class TestLosses:
    @pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
    def test_every_clip_has_one_in_every_part_of_the_range(self, scheduler):
        results = Validation(tiny(), scheduler, settings(), batches()).losses()
        assert {name: tuple(losses.shape) for name, losses in results.items()} == {
            "144p 17f 1:1": (3, BINS), "144p 1f 3:4": (3, BINS),
        }  # fmt: skip
        assert all(losses.isfinite().all() and (losses > 0).all() for losses in results.values())

    @pytest.mark.parametrize("scheduler", [RFLOW(), IDDPM(), IDDPM(num_sampling_steps=50)], ids=["rf", "all", "some"])
    def test_times_are_those_of_their_part(self, scheduler):
        model = Zero(8 if isinstance(scheduler, IDDPM) else 4)
        Validation(model, scheduler, settings(), batches()[:1]).losses()
        parts = [int(timestep / 1000 * BINS) for timestep in model.seen]
        assert parts == [part for part in range(BINS) for _ in range(2)]  # of two clips each
        assert len(set(model.seen)) > BINS

    def test_is_the_schedulers_own(self):
        """With a model that gives 0 the loss is that of the target, (data - noise) squared, at any time."""
        one = Validation(Zero(), RFLOW(), settings(), batches()[:1]).losses()["144p 17f 1:1"]
        assert one.mean().item() == pytest.approx(2.0, rel=0.05)

    @pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
    @some(2)
    def test_same_weights_same_numbers(self, scheduler):
        model = tiny()
        runs = []
        for step in range(3):
            torch.manual_seed(step)  # whatever training has drawn
            runs.append(report(Validation(model, scheduler, settings(), batches()).losses()))
            if step == 1:
                model.final_layer.linear.weight.data.mul_(1.5)
        assert runs[0] == runs[1] != runs[2]

    def test_other_seeds_draw_other_noise(self):
        one, other = (Validation(tiny(), RFLOW(), settings(seed=seed), batches()).losses() for seed in (1, 2))
        assert not torch.equal(one["144p 17f 1:1"], other["144p 17f 1:1"])

    def test_clips_are_noised_independently(self):
        """Two clips with the same content have other noise, and so do the parts of the range."""
        batch = examples("144p 17f 1:1", 2)
        batch = batch._replace(latents=torch.zeros_like(batch.latents))
        losses = Validation(Zero(), RFLOW(), settings(), [("x", batch)]).losses()["x"]
        assert len(set(losses.flatten().tolist())) == losses.numel()

    def test_what_could_not_be_read_does_not_count(self):
        with_black = [*batches(), ("144p 1f 3:4", examples("144p 1f 3:4", 1)._replace(weight=0.0))]
        one, other = (Validation(tiny(), RFLOW(), settings(), held).losses() for held in (batches(), with_black))
        assert all(torch.equal(one[name], other[name]) for name in SIZES)

    def test_nothing_is_disturbed(self):
        model = tiny()
        model.spatial_blocks[0].eval()
        modes = [module.training for module in model.modules()]
        before, drawn = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
        Validation(model, RFLOW(), settings(), batches()).losses(EMA(model, 0.9))
        assert torch.equal(torch.get_rng_state(), drawn) and torch.is_grad_enabled()
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))

    @pytest.mark.parametrize(("every", "due"), [(0, []), (2, [2, 4]), (5, [5])])
    def test_is_due(self, every, due):
        validation = Validation(Zero(), RFLOW(), settings(validate_every=every), [])
        assert [step for step in range(1, 6) if validation.due(step)] == due

    def test_learning_is_seen_in_every_bucket(self):
        """A model that is trained on these clips gets better at them, by the mean of many times."""
        model, held = tiny(), batches()
        validation = Validation(model, RFLOW(), settings(), held)
        optimizer, source = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
        before = report(validation.losses())
        for step in range(40):
            one = held[step % len(held)][1]
            optimizer.zero_grad()
            RFLOW().training_loss(model, one.latents, one.cond, generator=source).mean().backward()
            optimizer.step()
        after = report(validation.losses())
        for name in ("loss", "144p-17f-1:1", "144p-1f-3:4"):
            assert after[f"validation/{name}"] < 0.95 * before[f"validation/{name}"]


class TestAveragedWeights:
    def test_are_used_and_everything_is_put_back(self):
        model = tiny()
        ema = EMA(model, 0.5)
        expected = report(Validation(model, RFLOW(), settings(), batches()).losses())
        move(model)
        kept = [tensor.detach().clone() for tensor in (*model.parameters(), *ema.averaged)]
        validation = Validation(model, RFLOW(), settings(), batches())
        assert report(validation.losses(ema)) == expected != report(validation.losses())
        assert all(torch.equal(a, b) for a, b in zip(kept, (*model.parameters(), *ema.averaged), strict=True))

    def test_are_put_back_after_an_error(self):
        model = tiny()
        ema = EMA(model, 0.5)
        model.x_embedder.proj.weight.data.add_(1)
        kept = model.x_embedder.proj.weight.detach().clone()
        with pytest.raises(KeyboardInterrupt), inference_mode(model, ema):
            assert not torch.equal(model.x_embedder.proj.weight, kept) and not model.training
            raise KeyboardInterrupt
        assert torch.equal(model.x_embedder.proj.weight, kept) and model.training and torch.is_grad_enabled()


class TestReport:
    def test_names_and_means(self):
        ramp = torch.arange(BINS, dtype=torch.float64)
        line = report({"240p 17f 1:1": torch.stack([ramp, ramp + 2]), "144p 1f 3:4": ramp[None] + 4})
        assert line["validation/loss"] == pytest.approx(4.5 + 2)
        assert line["validation/240p-17f-1:1"] == 5.5 and line["validation/144p-1f-3:4"] == 8.5
        assert line["validation/240p-17f-1:1/t0.35"] == 4 and line["validation/t0.35"] == 5
        assert len(line) == 3 * (BINS + 1) and {"validation/t0.05", "validation/t0.95"} <= line.keys()

    def test_of_nothing(self):
        assert report({}) == {}


class TestSamples:
    def prompts(self) -> list[Prompt]:
        sizes = {"ball": (17, 32, 32), "still": (1, 32, 48)}
        return [Prompt(name, conditions(1, size, seed=1), size, 12) for name, size in sizes.items()]

    def vae(self) -> VideoAutoencoderPipeline:
        torch.manual_seed(1)
        return VideoAutoencoderPipeline(**TINY_VAE).eval()

    @pytest.mark.parametrize("kind", [RFLOW, IDDPM])
    def test_are_files_in_the_run(self, tmp_path: Path, kind: Any):
        scheduler = kind(num_sampling_steps=2)
        tracker = Tracker(tmp_path, settings(tensorboard=False))
        samples = Samples(tiny(), scheduler, self.vae(), settings(), self.prompts())
        paths = [tracker.video(name, frames, fps, 7) for name, frames, fps in samples.make()]
        assert [path.name for path in paths] == ["step0000007-ball.mp4", "step0000007-still.png"]
        frames, fps = read_video(paths[0])
        assert frames.shape == (17, 32, 32, 3) and fps == 12

    def test_same_weights_same_videos(self):
        model, vae = tiny(), self.vae()
        samples = Samples(model, RFLOW(num_sampling_steps=2), vae, settings(), self.prompts())
        first = [frames for _, frames, _ in samples.make()]
        torch.manual_seed(5)
        drawn = torch.get_rng_state()
        second = [frames for _, frames, _ in samples.make()]
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.equal(torch.get_rng_state(), drawn) and model.training

    def test_are_those_of_the_averaged_weights(self):
        model, vae = tiny(), self.vae()
        ema = EMA(model, 0.5)
        samples = Samples(model, RFLOW(num_sampling_steps=2), vae, settings(), self.prompts()[:1])
        ((_, expected, _),) = samples.make()
        move(model)
        ((_, averaged, _),), ((_, present, _),) = samples.make(ema), samples.make()
        assert np.array_equal(averaged, expected) and not np.array_equal(present, expected)

    def test_broken_weights_make_a_picture_too(self):
        """The guard tells of them; samples must not end the run."""
        model = tiny()
        model.x_embedder.proj.weight.data[:] = float("nan")
        samples = Samples(model, RFLOW(num_sampling_steps=1), self.vae(), settings(), self.prompts()[1:])
        assert [frames.shape for _, frames, _ in samples.make()] == [(1, 32, 48, 3)]

    @pytest.mark.parametrize(("every", "due"), [(0, []), (2, [2, 4])])
    def test_are_due(self, every, due):
        samples = Samples(Zero(), RFLOW(), None, settings(sample_every=every), [])
        assert [step for step in range(1, 6) if samples.due(step)] == due


def on_ranks() -> list[tuple[dict[str, float], int]]:
    """The report on sharded weights, and how many samples this rank has: with one rank to a sequence, and with two."""
    from opensora.distributed.parallelize import parallelize
    from opensora.distributed.process_group import start

    found = []
    for sp_size in (1, 2):
        layout, model = start(torch.device("cpu"), sp_size), tiny()
        parallelize(model, layout, torch.float32)
        ema = EMA(model, 0.5)
        line = report(Validation(model, RFLOW(), settings(), batches(), layout).losses(ema))
        torch.manual_seed(1)
        vae = VideoAutoencoderPipeline(**TINY_VAE).eval()
        samples = Samples(model, RFLOW(num_sampling_steps=1), vae, settings(), TestSamples().prompts()[:1], layout)
        found.append((line, len(list(samples.make(ema)))))
    return found


def test_ranks_give_the_numbers_of_one():
    alone = report(Validation(tiny(), RFLOW(), settings(), batches()).losses())
    for (first, made), (second, others) in zip(*run(2, on_ranks), strict=True):
        assert first == second and (made, others) == (1, 0)
        assert first == pytest.approx(alone, rel=1e-5)
