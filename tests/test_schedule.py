"""Steps are counted as they are taken: schedules end where the run ends, whatever a step takes of the data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.config.settings import TrainSettings
from opensora.errors import ConfigError, OpenSoraError
from opensora.training.checkpoint import folders
from opensora.training.data.loader import PrefetchLoader, Read, StepIndices
from opensora.training.schedule import Schedule
from opensora.training.trainer import Trainer
from tests.test_trainer import CPU, log


class Changing:
    """Epochs of these lengths in turn, as buckets have them; of batches `empty(number)` nothing can be read."""

    def __init__(self, lengths: list[int], empty: set[int] | None = None) -> None:
        self.lengths, self.empty = lengths, empty or set()

    def count(self, epoch: int) -> int:
        return self.lengths[epoch % len(self.lengths)]

    def reader(self, epoch: int, index: int) -> Read:
        number = sum(map(self.count, range(epoch))) + index
        names = [] if number in self.empty else [f"{number}.mp4", f"{number}.png"]
        return lambda: {"names": names, "weight": float(bool(names)), "number": number}


def run_of(outputs: Path, source: Any, ranks: int = 1, **settings: Any) -> Trainer:
    """One of so many ranks, which computes alone."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)

    def loss(batch: Any, generator: torch.Generator) -> Tensor:
        return model(torch.randn(8, 4, generator=generator)).square().mean() * (
            batch["weight"] if isinstance(batch, dict) else 1
        )

    how: dict[str, Any] = dict(dtype="fp32", lr=0.1, lr_schedule="cosine", log_every=1, tensorboard=False)
    asked = TrainSettings(model={"type": "Linear"}, outputs=str(outputs), **{**how, **settings})
    return Trainer(asked, model, loss, CPU, PrefetchLoader(source, 0, ranks), fingerprint={"lr": "0.1"})


@pytest.mark.parametrize(
    ("lengths", "ranks", "accumulation", "epochs"),
    [([11], 1, 6, 6), ([11], 1, 1, 2), ([11], 2, 3, 6), ([7], 3, 1, 4), ([5], 1, 12, 3), ([2, 9, 4], 2, 2, 7),
     ([100, 1], 8, 1, 3), ([3], 4, 4, 1)],
)  # fmt: skip
def test_cosine_ends_where_the_run_ends(
    tmp_path: Path, lengths: list[int], ranks: int, accumulation: int, epochs: int
) -> None:
    source = Changing(lengths)
    run = run_of(tmp_path, source, ranks, accumulation_steps=accumulation, epochs=epochs)
    total = math.ceil(sum(map(source.count, range(epochs))) / (ranks * accumulation))
    assert run.total_steps == total
    run.run()
    rates = [line["lr"] for line in log(run.folder)]
    assert run.step == len(rates) == total and min(rates) > 0
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * step / total)) for step in range(total)])


@pytest.mark.parametrize("stops", [[1], [3, 4], [2, 6, 7]])
@pytest.mark.parametrize("lengths", [[11], [2, 9, 4]])
def test_a_resumed_schedule_is_the_same(
    tmp_path: Path, lengths: list[int], stops: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"accumulation_steps": 2, "epochs": 3, "warmup_steps": 2}
    whole = run_of(tmp_path / "whole", Changing(lengths), **how)
    whole.run()
    load = None
    for stop in [*stops, 0]:
        run = run_of(tmp_path / "parts", Changing(lengths), load=load, **how)
        assert run.total_steps == whole.total_steps
        run.callbacks.append(lambda run, stop=stop: run.step == stop and setattr(run.stop_signals, "received", 15))
        with pytest.raises(SystemExit) if stop else monkeypatch.context():
            run.run()
        load = str(run.folder)
    assert [line["lr"] for line in log(run.folder)] == [line["lr"] for line in log(whole.folder)]
    assert torch.equal(run.model.weight, whole.model.weight)


@pytest.mark.parametrize(
    ("change", "ranks", "words"),
    [({"epochs": 5}, 1, "the length of the schedule was 17 and is 28"),
     ({"epochs": 2}, 1, "the length of the schedule was 17 and is 11"),
     ({}, 2, "the length of the schedule was 17 and is 11"),
     ({"accumulation_steps": 1}, 1, "the length of the schedule was 17 and is 28")],
)  # fmt: skip
def test_another_length_is_refused(tmp_path: Path, change: dict[str, Any], ranks: int, words: str) -> None:
    how = {"accumulation_steps": 2, "epochs": 3}
    run = run_of(tmp_path, StepIndices(11), **how)
    run.callbacks.append(lambda run: run.step == 5 and setattr(run.stop_signals, "received", 15))
    with pytest.raises(SystemExit):
        run.run()
    with pytest.raises(ConfigError, match=rf"{words}; undo that, or continue with --accept-changes"):
        run_of(tmp_path, StepIndices(11), ranks, load=str(run.folder), **{**how, **change})
    rest = run_of(tmp_path, StepIndices(11), ranks, load=str(run.folder), accept_changes=True, **{**how, **change})
    rest.run()
    assert rest.step == rest.total_steps and min(line["lr"] for line in log(rest.folder)) > 0
    constant = {"lr_schedule": "constant"}
    first = run_of(tmp_path / "c", StepIndices(11), **how, **constant)
    first.run()
    assert (
        run_of(tmp_path / "c", StepIndices(11), ranks, load=str(first.folder), **{**how, **change}, **constant).step
        == 17
    )


def test_earlier_versions_did_not_record_it(tmp_path: Path) -> None:
    run = run_of(tmp_path, StepIndices(11), epochs=1)
    run.schedule.fingerprint = dict
    run.run()
    assert run_of(tmp_path, StepIndices(11), load=str(run.folder), epochs=2).step == 11


class TestNothingToRead:
    @pytest.mark.parametrize(
        ("empty", "steps", "samples"), [({0}, 11, 22), ({0, 3, 4}, 9, 18), ({10, 11}, 10, 20), (set(range(7)), 5, 10)]
    )
    def test_is_no_step(self, tmp_path: Path, empty: set[int], steps: int, samples: int) -> None:
        run = run_of(tmp_path, Changing([6], empty), epochs=2)
        run.run()
        assert (run.step, run.train_step.samples, run.total_steps) == (steps, samples, steps)
        assert [line["step"] for line in log(run.folder)] == list(range(1, steps + 1))
        assert log(run.folder)[-1]["lr"] > 0

    def test_a_part_of_a_step_is(self, tmp_path: Path) -> None:
        run = run_of(tmp_path, Changing([6], {1, 2, 3}), accumulation_steps=2, epochs=1)
        run.run()
        assert (run.step, run.train_step.samples) == (2, 6)

    @pytest.mark.parametrize("how", [{"epochs": 1}, {"max_steps": 5}, {"epochs": 3, "accumulation_steps": 4}])
    def test_a_run_without_a_sample_fails(self, tmp_path: Path, how: dict[str, Any]) -> None:
        run = run_of(tmp_path, Changing([6], set(range(100))), **how)
        with pytest.raises(OpenSoraError, match=r"no sample (could be read|of a whole epoch could be read)"):
            run.run()
        assert folders.checkpoints(run.folder) == []

    def test_resumes(self, tmp_path: Path) -> None:
        how = {"epochs": 2, "ckpt_every": 1, "keep_checkpoints": 99}
        whole = run_of(tmp_path / "a", Changing([6], {0, 3, 4, 9}), **how)
        whole.run()
        for checkpoint in folders.checkpoints(whole.folder):
            run = run_of(tmp_path / "b", Changing([6], {0, 3, 4, 9}), load=str(checkpoint), **how)
            run.run()
            assert torch.equal(run.model.weight, whole.model.weight)
            assert run.train_step.samples == whole.train_step.samples == 16


def test_a_large_table_is_not_counted_without_need() -> None:
    class Slow(StepIndices):
        def count(self, epoch: int) -> int:
            assert epoch == 0
            return 11

    schedule = Schedule(TrainSettings(model={"type": "x"}, epochs=10**6), Slow(11), 3)
    assert schedule.learning_rate(5) == 1e-4 and schedule.fingerprint() == {}
    assert schedule.expected_steps == math.ceil(11 * 10**6 / 3)
