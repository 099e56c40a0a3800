"""The training loop and its checkpoints, on a model of one layer."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.config.settings import TrainSettings
from opensora.errors import ConfigError, OpenSoraError, WeightsError
from opensora.training.autoencoder import train_vae
from opensora.training.checkpoint import folders, write
from opensora.training.checkpoint.fingerprint import differences, fingerprint
from opensora.training.data.clip_features import Batches
from opensora.training.diffusion import train
from opensora.training.feature_extraction.clips import Features
from opensora.training.step import step_generator
from opensora.training.trainer import Trainer
from tests.tiny import TINY_VAE

CPU = torch.device("cpu")
OF_A_RUN = ["log.jsonl", "run.json", "run.lock"]
TIMINGS = {"step_s", "clips_per_s", "tokens_per_s", "data_wait", "mfu"}


def trainer(
    outputs: Path, nan_at: int | None = None, interrupt_at: int | None = None, epoch: int = 5,
    fingerprint: dict[str, str] | None = None, deferred_check: bool | None = None, **changes: Any,
) -> Trainer:  # fmt: skip
    """A run of 10 steps that fits a layer to noise; optionally its loss breaks down, or Ctrl-C comes, at a step."""
    settings = dict(
        dtype="fp32", seed=1, lr=0.1, max_steps=10, log_every=1, ckpt_every=2, ema_decay=0.5, tensorboard=False
    )
    torch.manual_seed(0)
    model = nn.Linear(4, 4)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        if step == interrupt_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=generator)
        return (model(x) - 2 * x).float().square().mean() * (math.nan if step == nan_at else 1)

    return Trainer(TrainSettings(model={"type": "Linear/1"}, outputs=str(outputs), **{**settings, **changes}),
                   model, loss, CPU, epoch, fingerprint=fingerprint, deferred_check=deferred_check)  # fmt: skip


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def names(folder: Path) -> list[str]:
    return [path.name for path in folders.checkpoints(folder)]


def assert_same_end(found: Trainer, expected: Trainer) -> None:
    assert found.step == expected.step and log(found.folder) == log(expected.folder)
    for a, b in ((found.model, expected.model), (found.ema, expected.ema)):
        for name, tensor in b.state_dict().items():
            assert torch.equal(a.state_dict()[name], tensor)
    states = (run.optimization.optimizer.state.values() for run in (found, expected))
    for a, b in zip(*states, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


class TestSchedule:
    @pytest.mark.parametrize("warmup", [0, 1, 5])
    def test_warmup_then_constant(self, tmp_path: Path, warmup: int) -> None:
        run = trainer(tmp_path, warmup_steps=warmup)
        rates = [run.learning_rate(step) for step in range(10)]
        assert rates == pytest.approx([0.1 * min((step + 1) / (warmup + 1), 1) for step in range(10)])

    def test_warmup_then_cosine(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, warmup_steps=2, lr_schedule="cosine")
        assert [run.learning_rate(step) for step in (0, 1, 2, 6, 10)] == pytest.approx(
            [0.1 / 3, 0.2 / 3, 0.1, 0.05, 0], abs=1e-9
        )

    def test_optimizer_uses_it(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, warmup_steps=4, max_steps=2)
        run.run()
        assert run.optimization.optimizer.param_groups[0]["lr"] == run.learning_rate(1) == log(run.folder)[-1]["lr"]


class TestRun:
    def test_leaves_a_log_and_the_newest_checkpoints(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, keep_checkpoints=3)
        assert run.run() == tmp_path / "000-Linear-1" / "epoch2-global_step10"
        assert names(run.folder) == ["epoch1-global_step6", "epoch1-global_step8", "epoch2-global_step10"]
        assert [line["step"] for line in log(run.folder)] == list(range(1, 11))
        assert log(run.folder)[-1]["loss"] < log(run.folder)[0]["loss"]

    def test_last_step_is_saved_when_it_is_not_due(self, tmp_path: Path) -> None:
        assert trainer(tmp_path, max_steps=3).run().name == "epoch0-global_step3"
        assert trainer(tmp_path, ckpt_every=0, max_steps=3).run().name == "epoch0-global_step3"

    @pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
    def test_every_precision_makes_steps(self, tmp_path: Path, dtype: str) -> None:
        run = trainer(tmp_path, dtype=dtype)
        before = run.model.weight.clone()
        run.run()
        assert run.model.weight.dtype == torch.float32 and not torch.equal(run.model.weight, before)
        assert log(run.folder)[-1]["loss"] < log(run.folder)[0]["loss"]

    def test_gradients_are_clipped(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, grad_clip=1e-3)
        seen = []
        run.optimization.optimizer.register_step_pre_hook(
            lambda *_: seen.append(torch.cat([p.grad.flatten() for p in run.optimization.parameters]).norm().item())
        )
        run.run()
        assert seen == pytest.approx([1e-3] * 10, rel=1e-2)

    def test_step_is_keyed_by_seed_and_number(self) -> None:
        draws = [torch.rand((), generator=step_generator(*key)).item() for key in ((1, 2), (1, 2), (1, 3), (2, 2))]
        assert draws[0] == draws[1] and len(set(draws)) == 3

    def test_time_limit_stops_and_saves(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        now = iter(range(0, 1000, 20))
        monkeypatch.setattr("opensora.training.trainer.time.monotonic", lambda: next(now))
        run = trainer(tmp_path, max_minutes=1, log_every=100)
        folder = run.run()
        assert folder.name == f"epoch0-global_step{run.step}" and 0 < run.step < 10
        monkeypatch.undo()
        whole = trainer(tmp_path / "whole", log_every=100)
        whole.run()
        rest = trainer(tmp_path, load=str(run.folder), log_every=100)
        rest.run()
        assert rest.step == 10 and torch.equal(rest.model.weight, whole.model.weight)

    def test_zero_batches_refuse_to_start(self) -> None:
        features = Features(*[torch.zeros(3, 1)] * 4)
        with pytest.raises(ConfigError, match="3 clips do not fill one batch of 4"):
            Batches(features, 4, 0)

    def test_batches_are_shuffled_epochs(self) -> None:
        column = torch.arange(7.0)[:, None]
        batches = Batches(Features(*[column] * 4), 2, 0)
        epochs = [[batches(step).latents.flatten().tolist() for step in range(e * 3, e * 3 + 3)] for e in range(2)]
        assert all(len({x for batch in epoch for x in batch}) == 6 for epoch in epochs) and epochs[0] != epochs[1]
        assert batches(1).latents.flatten().tolist() == epochs[0][1]


class TestResume:
    @pytest.fixture
    def whole(self, tmp_path: Path) -> Trainer:
        run = trainer(tmp_path / "whole", log_every=3)
        run.run()
        return run

    @pytest.mark.parametrize("stop", [4, 5])
    def test_experiment_folder(self, tmp_path: Path, whole: Trainer, stop: int) -> None:
        first = trainer(tmp_path, log_every=3, max_steps=stop)
        first.run()
        run = trainer(tmp_path, log_every=3, load=str(first.folder))
        assert run.step == stop and run.folder == first.folder
        run.run()
        assert_same_end(run, whole)

    def test_a_checkpoint_of_earlier_code(self, tmp_path: Path) -> None:
        """Written when checkpoints got manifests and guards; its step 2 was bad."""
        options: dict[str, Any] = dict(nan_at=2, log_every=4, warmup_steps=3)
        shutil.copytree(Path(__file__).parent / "data" / "checkpoint", tmp_path / "epoch1-global_step6")
        whole, run = trainer(tmp_path / "whole", **options), trainer(tmp_path, load=str(tmp_path), **options)
        whole.run(), run.run()
        assert run.step == whole.step == 10 and run.train_step.samples == whole.train_step.samples == 9
        assert list(run.optimization.guard.norms) == pytest.approx(list(whole.optimization.guard.norms))
        for ours, expected in ((run.model, whole.model), (run.ema, whole.ema)):
            torch.testing.assert_close(ours.state_dict(), expected.state_dict())

    def test_older_checkpoint_branches_off(self, tmp_path: Path, whole: Trainer) -> None:
        """What was trained after it stays; the run gets a folder of its own with the log up to there."""
        kept = names(whole.folder)
        run = trainer(tmp_path, log_every=3, load=str(whole.folder / kept[0]))
        assert run.folder == tmp_path / "000-Linear-1" and run.step == 8
        run.run()
        assert_same_end(run, whole)
        assert names(whole.folder) == kept

    def test_newest_checkpoint_by_name(self, tmp_path: Path, whole: Trainer) -> None:
        run = trainer(tmp_path, log_every=3, load=f"{whole.folder / 'epoch2-global_step10'}/", max_steps=12)
        assert run.folder == whole.folder and run.step == 10
        assert run.run().name == "epoch2-global_step12"

    def test_finished_run_writes_nothing(self, tmp_path: Path, whole: Trainer) -> None:
        before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("epoch*")}
        assert trainer(tmp_path, log_every=3, load=str(whole.folder)).run().name == "epoch2-global_step10"
        assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("epoch*")} == before

    def test_start_from_scratch_takes_the_weights_only(self, tmp_path: Path, whole: Trainer) -> None:
        run = trainer(tmp_path, load=str(whole.folder), start_from_scratch=True)
        assert run.step == 0 and run.folder != whole.folder
        assert torch.equal(run.model.weight, whole.model.weight)

    def test_fp16_goes_on_from_fp32(self, tmp_path: Path, whole: Trainer) -> None:
        run = trainer(tmp_path, load=str(whole.folder), dtype="fp16", max_steps=12, accept_changes=True)
        run.run()
        assert run.step == 12

    def test_half_written_checkpoint_is_ignored_and_swept_away(self, tmp_path: Path, whole: Trainer) -> None:
        half = whole.folder / ".epoch3-global_step15.tmp"
        half.mkdir()
        (half / "running_states.json").write_text("{")
        run = trainer(tmp_path, load=str(whole.folder), max_steps=12)
        assert run.step == 10
        run.run()
        assert not half.exists()

    def test_log_of_a_killed_run_is_cut(self, tmp_path: Path, whole: Trainer) -> None:
        with (whole.folder / "log.jsonl").open("a") as file:
            file.write('{"step": 12, "loss": 1.0}\n{"step": 15, "lo')
        trainer(tmp_path, load=str(whole.folder))
        assert [line["step"] for line in log(whole.folder)] == [3, 6, 9]

    def test_nothing_to_resume(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="no training checkpoint at"):
            trainer(tmp_path, load=str(tmp_path / "nowhere"))
        empty = trainer(tmp_path).folder
        (empty / ".epoch0-global_step2.tmp").mkdir()
        with pytest.raises(WeightsError, match="holds no finished checkpoint"):
            trainer(tmp_path, load=str(empty))


class TestAccumulation:
    def batches(self, outputs: Path, size: int, **changes: Any) -> Trainer:
        """A run whose batch n is rows n * size and on of a fixed table."""
        torch.manual_seed(0)
        model, table = nn.Linear(4, 4), torch.randn(48, 4)

        def loss(number: int, generator: torch.Generator) -> Tensor:
            x = table[number * size : (number + 1) * size]
            return (model(x) - 2 * x).square().mean()

        asked = dict(dtype="fp32", lr=0.1, ckpt_every=0, log_every=2, max_steps=6, grad_clip=0.5)
        return Trainer(TrainSettings(model={"type": "Linear"}, outputs=str(outputs), **{**asked, **changes}),
                       model, loss, CPU, 48 // size)  # fmt: skip

    def test_changes_nothing(self, tmp_path: Path) -> None:
        whole, parts = self.batches(tmp_path / "a", 8), self.batches(tmp_path / "b", 2, accumulation_steps=4)
        whole.run(), parts.run()
        torch.testing.assert_close(parts.model.weight, whole.model.weight)
        for a, b in zip(log(parts.folder), log(whole.folder), strict=True):
            assert a == pytest.approx(b, rel=1e-5)

    def test_resumes(self, tmp_path: Path) -> None:
        whole = self.batches(tmp_path / "a", 2, accumulation_steps=3)
        whole.run()
        first = self.batches(tmp_path / "b", 2, accumulation_steps=3, max_steps=3)
        first.run()
        rest = self.batches(tmp_path / "b", 2, accumulation_steps=3, load=str(first.folder))
        assert rest.loader.position == (0, 9)
        rest.run()
        assert torch.equal(rest.model.weight, whole.model.weight) and log(rest.folder) == log(whole.folder)

    def test_each_batch_draws_its_own_numbers(self) -> None:
        keys = ((1, 2, 0), (1, 2, 1), (1, 21, 0), (1, 2, 11))
        assert len({step_generator(*key).initial_seed() for key in keys}) == 4
        assert step_generator(1, 2, 0).initial_seed() == step_generator(1, 2).initial_seed()


class TestChanges:
    """A run that goes on with other data or settings."""

    def test_is_refused_and_says_what_changed(self, tmp_path: Path) -> None:
        first = trainer(tmp_path, max_steps=2)
        first.fingerprint = {"lr": "0.1", "the table": "one"}
        first.run()
        changed = {"load": str(first.folder), "fingerprint": {"lr": "0.2", "the table": "one", "seed": "3"}}
        with pytest.raises(ConfigError, match=r"lr was 0.1 and is 0.2; seed was not set and is 3; .* --accept-changes"):
            trainer(tmp_path, **changed)
        assert trainer(tmp_path, accept_changes=True, **changed).step == 2
        assert trainer(tmp_path, start_from_scratch=True, **changed).step == 0
        assert trainer(tmp_path, load=str(first.folder), fingerprint=first.fingerprint).step == 2

    def test_settings_that_decide_numbers_count(self) -> None:
        model = {"type": "STDiT3", "from_pretrained": "here", "depth": 2}
        one = TrainSettings(model=model, lr=1e-3, dataset={"type": "T", "data_path": "a", "frame_interval": 2})
        moved = TrainSettings(
            model={**model, "from_pretrained": "there"}, lr=1e-3, log_every=5, outputs="elsewhere", epochs=3,
            dataset={"type": "T", "data_path": "b", "frame_interval": 2},
        )  # fmt: skip
        assert fingerprint(one) == fingerprint(moved)
        other = TrainSettings(model={**model, "depth": 3}, lr=2e-3, bucket_config={"144p": {1: (1.0, 2)}})
        found = differences(fingerprint(one), fingerprint(other))
        assert [change.split(" was")[0] for change in found] == [
            "bucket_config.144p.1", "dataset.frame_interval", "dataset.type", "lr", "model.depth",
        ]  # fmt: skip

    def test_what_only_samples_depend_on_does_not_count(self) -> None:
        def prints(kind: str, **scheduler: Any) -> dict[str, str]:
            return fingerprint(TrainSettings(model={"type": "STDiT3"}, scheduler={"type": kind, **scheduler}))

        fewer = prints("rflow", sample_method="logit-normal")
        assert prints("rflow", sample_method="logit-normal", num_sampling_steps=30, cfg_scale=7.0) == fewer
        assert prints("iddpm", cfg_scale=7.0, cfg_channel=3) == prints("iddpm")
        assert prints("iddpm", num_sampling_steps=50) != prints("iddpm"), "it trains on those steps alone"
        earlier = {**fewer, "scheduler.cfg_scale": "7.0", "scheduler.num_sampling_steps": "30"}
        assert differences(earlier, fewer) == []

    def test_the_length_counts_where_the_rate_depends_on_it(self) -> None:
        def prints(**settings: Any) -> dict[str, str]:
            return fingerprint(TrainSettings(model={"type": "STDiT3"}, **settings))

        assert prints(max_steps=5) == prints(max_steps=6)
        assert prints(max_steps=5, lr_schedule="cosine") != prints(max_steps=6, lr_schedule="cosine")


class TestTrouble:
    def test_broken_loss_stops_and_leaves_the_last_good_checkpoint(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, nan_at=5, on_bad_step="stop")
        with pytest.raises(OpenSoraError, match=r"step 5: the loss is not finite .* --load"):
            run.run()
        assert names(run.folder) == ["epoch0-global_step2", "epoch0-global_step4"]
        again = trainer(tmp_path, load=str(run.folder))
        assert all(p.isfinite().all() for p in again.model.parameters())

    def test_a_bad_step_is_skipped(self, tmp_path: Path) -> None:
        run, steps = trainer(tmp_path, nan_at=5), []
        run.optimization.optimizer.register_step_pre_hook(lambda *_: steps.append(run.step))
        run.run()
        assert steps == [0, 1, 2, 3, 4, 6, 7, 8, 9] and all(p.isfinite().all() for p in run.model.parameters())
        lines = [line for line in log(run.folder) if "bad_step" not in line]
        assert [line["step"] for line in lines if "loss" not in line] == [6]
        assert [line["step"] for line in log(run.folder) if "bad_step" in line] == [5]

    def test_a_bad_step_rolls_back(self, tmp_path: Path) -> None:
        """The weights of step 4 meet the data of step 6."""
        run, before = trainer(tmp_path, nan_at=5, on_bad_step="rollback"), {}
        run.callbacks.append(lambda run: before.setdefault(run.step, run.model.weight.detach().clone()))
        run.run()
        assert torch.equal(before[6], before[4]) and not torch.equal(before[5], before[4]) and run.step == 10

    def test_broken_weights_are_not_saved(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, max_steps=3, ckpt_every=2)
        run.callbacks.append(lambda run: run.step == 3 and run.model.weight.data.fill_(math.nan))
        with pytest.raises(
            OpenSoraError, match=r"the weights are not finite at step 3; resume with --load .*step2 and"
        ):
            run.run()
        assert names(run.folder) == ["epoch0-global_step2"]

    def test_interrupt_while_training(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, interrupt_at=5)
        with pytest.raises(KeyboardInterrupt):
            run.run()
        assert names(run.folder) == ["epoch0-global_step2", "epoch0-global_step4"]

    @pytest.mark.parametrize(("error", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt),
                                                   (OSError("no space left on device"), WeightsError)])  # fmt: skip
    def test_trouble_while_saving_leaves_nothing_half_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException]
    ) -> None:
        run = trainer(tmp_path)
        saves = iter((None, error))

        def sync(folder: Path) -> None:
            if trouble := next(saves):
                raise trouble

        monkeypatch.setattr(write, "_sync", sync)
        with pytest.raises(raised):
            run.run()
        assert sorted(path.name for path in run.folder.iterdir()) == ["epoch0-global_step2", "latest", *OF_A_RUN]

    @pytest.mark.parametrize(
        ("dataset", "words"),
        [
            (None, "dataset type 'None' cannot be trained on yet; use ShapeClips or WorldClips"),
            (dict(type="ShapeClips", num_frames=5), "dataset needs image_size"),
        ],
    )
    def test_data_that_cannot_be_trained_on(self, tmp_path: Path, dataset: dict[str, Any] | None, words: str) -> None:
        shared: dict[str, Any] = dict(dataset=dataset, batch_size=1, device="cpu", outputs=str(tmp_path / "runs"))
        with pytest.raises(ConfigError, match=words):
            train(TrainSettings(model={"type": "STDiT3"}, scheduler={"type": "rflow"}, **shared))
        with pytest.raises(ConfigError, match=words):
            model = dict(type="VideoAutoencoderPipeline", **TINY_VAE)
            train_vae(TrainSettings(model=model, perceptual_loss_weight=0.0, **shared))
        assert not (tmp_path / "runs").exists()
