"""Steps that nobody waits for: a trainer that reads its guard one step late gets the numbers of one that waits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.acceleration.activation_checkpointing import checkpoint_blocks
from opensora.acceleration.device import pick_device
from opensora.config.settings import TrainSettings
from opensora.distributed.parallelize import parallelize
from opensora.distributed.process_group import start
from opensora.errors import OpenSoraError
from opensora.training import bad_step_guard as guards
from opensora.training.data.loader import PrefetchLoader, StepIndices
from opensora.training.trainer import Trainer
from tests.full import some
from tests.ranks import run
from tests.test_sequence import BATCH, full, loss_of, make
from tests.test_trainer import CPU, assert_same_end, log, trainer


def both(tmp_path: Path, **options: Any) -> tuple[Trainer, Trainer]:
    """A run that waits after each step and one that does not, both at their ends."""
    runs = trainer(tmp_path / "waits", **options), trainer(tmp_path / "late", deferred_check=True, **options)
    for one in runs:
        one.run()
    return runs


@pytest.mark.parametrize("every", [{"log_every": 1}, {"log_every": 3, "ckpt_every": 4}, {"log_every": 10}])
@pytest.mark.parametrize("nan_at", [None, 0, 3, 9])
@some(6)
def test_bad_steps_are_left_out(tmp_path: Path, nan_at: int | None, every: dict[str, int]) -> None:
    waits, late = both(tmp_path, nan_at=nan_at, lr_schedule="cosine", **every)
    assert_same_end(late, waits)
    assert late.optimization.guard.state_dict() == waits.optimization.guard.state_dict()
    assert [line["bad_step"]["what"] for line in log(late.folder) if "bad_step" in line] == (
        [] if nan_at is None else [guards.LOSS]
    )


@pytest.mark.parametrize("log_every", [1, 10])
def test_roll_back(tmp_path: Path, log_every: int) -> None:
    options = {"nan_at": 5, "on_bad_step": "rollback", "log_every": log_every, "ckpt_every": 4, "warmup_steps": 8}
    waits, late = both(tmp_path, **options)
    assert_same_end(late, waits)


def test_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them one after another, the limit being that of the steps before."""
    monkeypatch.setattr(guards, "MIN_NORMS", 2)
    waits, late = both(tmp_path, spike_factor=1.0, log_every=10, ckpt_every=0)
    assert_same_end(late, waits)
    answers = ["bad_step" in line for line in log(late.folder)]
    assert late.optimization.guard.state_dict() == waits.optimization.guard.state_dict() and any(answers)


def test_stop_spares_the_weights(tmp_path: Path) -> None:
    run = trainer(tmp_path, nan_at=6, on_bad_step="stop", log_every=10, deferred_check=True)
    with pytest.raises(OpenSoraError, match=r"^step 6: the loss is not finite"):
        run.run()
    assert all(one.isfinite().all() for one in run.optimization.parameters)


def test_a_resumed_run_ends_like_one_that_waits(tmp_path: Path) -> None:
    options = {"nan_at": 7, "log_every": 3, "ckpt_every": 5}
    first = trainer(tmp_path, max_steps=5, deferred_check=True, **options)
    rest = trainer(tmp_path, load=str(first.run()), deferred_check=True, **options)
    rest.run()
    whole = trainer(tmp_path / "whole", **options)
    whole.run()
    assert_same_end(rest, whole)


def test_nothing_is_read_before_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten steps with a line of the log after the fifth, four are read in their turn, and five after the next one."""
    reads: list[tuple[int, int]] = []
    resolve = guards.BadStepGuard.resolve

    def read(self: Any, check: Any, ids: Any = (), step: int = 0, *others: Any) -> str:
        reads.append((step, run.step))
        return resolve(self, check, ids, step, *others)

    monkeypatch.setattr(guards.BadStepGuard, "resolve", read)
    run = trainer(tmp_path, log_every=5, ckpt_every=0, deferred_check=True)
    run.run()
    assert reads == [(step, step + 1) for step in range(10)]
    assert run.train_step.pending is None


def sharded(folder: Path, late: bool) -> dict[str, Any]:
    """Weights and averages after four steps on two ranks, the second of which one rank's loss spoils."""
    layout = start(CPU)
    model = make("STDiT3").float()
    parallelize(model, layout, torch.float32)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        bad = step // 2 == 1 and layout.rank == 1
        return loss_of(model, "STDiT3", step, slice(BATCH)) * (math.nan if bad else 1)

    settings = TrainSettings(
        model={"type": "STDiT3"}, dtype="fp32", max_steps=4, log_every=4, lr=1e-3, ema_decay=0.5, grad_clip=1.0,
        outputs=str(folder / str(late)), tensorboard=False,
    )  # fmt: skip
    loader = PrefetchLoader(StepIndices(8), layout.data_rank, layout.data_size)
    one = Trainer(settings, model, loss, CPU, loader, layout, deferred_check=late)
    one.run()
    states = {"weights": model.state_dict(), "averages": one.ema.state_dict()}
    return {f"{name} {key}": full(value) for name, state in states.items() for key, value in state.items()}


def on_two_ranks(folder: Path) -> list[dict[str, Any]]:
    return [sharded(folder, late) for late in (False, True)]


def test_sharded_weights_too(tmp_path: Path) -> None:
    for waits, late in run(2, on_two_ranks, tmp_path):
        assert waits.keys() == late.keys() and all(torch.equal(late[name], waits[name]) for name in waits)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@some(2)
def test_checkpointed_blocks_are_computed_again_as_they_were(tmp_path: Path, dtype: str, late: bool) -> None:
    """In the backward pass of training, and in that of the guard, which looks into a step that jumps."""
    model = make("STDiT3").float()
    checkpoint_blocks(model)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        return loss_of(model, "STDiT3", step, slice(BATCH)) * (math.inf if step == 1 else 1)

    settings = TrainSettings(
        model={"type": "STDiT3"}, dtype=dtype, max_steps=3, log_every=1, lr=1e-3, outputs=str(tmp_path), max_bad_steps=3
    )  # fmt: skip
    one = Trainer(settings, model, loss, CPU, 8, deferred_check=late)
    one.run()
    assert ["bad_step" in line for line in log(one.folder)].count(True) == 1


def test_checkpoints_leave_the_kernels_to_the_device(tmp_path: Path) -> None:
    """A run that goes on elsewhere takes its steps by what it finds there."""
    first = trainer(tmp_path, max_steps=4)
    first.optimization.optimizer.param_groups[0].update(fused=False, foreach=True)
    rest = trainer(tmp_path, load=str(first.run()))
    assert rest.optimization.optimizer.param_groups[0]["fused"] is True
    rest.run()
    assert rest.step == 10


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
def test_an_accelerator_is_not_waited_for(tmp_path: Path) -> None:
    device, weights = pick_device(), []
    for late in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(4, 4).to(device)

        def loss(step: int, generator: torch.Generator, model: nn.Module = model) -> Tensor:
            x = torch.randn(8, 4, generator=generator).to(device)
            return (model(x) - 2 * x).square().mean() * (math.nan if step == 3 else 1)

        how = {"dtype": "fp32", "max_steps": 10, "log_every": 5, "tensorboard": False, "outputs": str(tmp_path)}
        asked = TrainSettings(model={"type": "Linear"}, **how)
        one = Trainer(asked, model, loss, device, 16, deferred_check=None if late else False)
        assert one.optimization.deferred_check == late, "its optimizer takes steps in one kernel, and it has events"
        one.run()
        weights.append(torch.cat([model.weight, one.ema.state_dict()["weight"]]).detach())
    assert torch.equal(*weights)
