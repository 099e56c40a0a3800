"""Signals that ask a training to end: it saves, says how to go on, and ends with a status that tells the signal."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.config.settings import TrainSettings
from opensora.distributed.parallelize import parallelize
from opensora.distributed.process_group import start
from opensora.training.checkpoint import folders
from opensora.training.data.loader import PrefetchLoader, StepIndices
from opensora.training.trainer import Trainer
from tests.full import some
from tests.ranks import run
from tests.test_sequence import BATCH, loss_of, make
from tests.test_trainer import CPU, assert_same_end, names, trainer

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT]


@pytest.fixture(autouse=True)
def _handlers_come_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("number", SIGNALS)
@some(4)
def test_it_saves_at_the_end_of_the_step(
    tmp_path: Path, number: int, late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trainer(tmp_path / "whole", log_every=3)
    whole.run()
    one = trainer(tmp_path / "one", log_every=3, ckpt_every=0, deferred_check=late)
    one.callbacks.append(lambda run: run.step == 5 and os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as end:
        one.run()
    assert end.value.code == 128 + number and names(one.folder) == ["epoch1-global_step5"]
    name = signal.Signals(number).name
    assert f"ended by {name}: step 5 is done, saved in {one.saved}; resume with --load {one.folder}" in caplog.text
    rest = trainer(tmp_path / "one", log_every=3, load=str(one.folder))
    rest.run()
    assert_same_end(rest, whole)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_ignored_stays_so(tmp_path: Path, number: int) -> None:
    """As SIGHUP is under nohup."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        one = trainer(tmp_path)
        one.callbacks.append(lambda run: run.step == 5 and os.kill(os.getpid(), number))
        one.run()
        assert one.step == 10
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_one_does_what_it_did_before(tmp_path: Path, number: int) -> None:
    class Ended(BaseException):
        pass

    def end(*_: Any) -> None:
        raise Ended

    before = signal.signal(number, end)
    try:
        one = trainer(tmp_path)
        one.callbacks.append(lambda run: run.step == 5 and [os.kill(os.getpid(), number) for _ in range(2)])
        with pytest.raises(Ended):
            one.run()
        assert names(one.folder) == ["epoch0-global_step2", "epoch0-global_step4"]
    finally:
        signal.signal(number, before)


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = trainer(tmp_path)
    one.stop_signals.received = signal.SIGTERM
    with pytest.raises(SystemExit):
        one.run()
    assert folders.checkpoints(one.folder) == [] and "nothing was saved; start again" in caplog.text


def test_a_run_that_is_done_ends_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "opensora")
    one = trainer(tmp_path)
    one.callbacks.append(lambda run: run.step == 10 and os.kill(os.getpid(), signal.SIGTERM))
    assert one.run().name == "epoch2-global_step10"


def stopped(folder: Path, who: int, number: int) -> tuple[Any, int]:
    """The status of this rank and its step, where one rank gets a signal in step 2."""
    layout = start(CPU)
    model = make("STDiT3").float()
    parallelize(model, layout, torch.float32)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        if one.step == 2 and layout.rank == who:
            os.kill(os.getpid(), number)
        return loss_of(model, "STDiT3", step, slice(BATCH))

    how = dict(dtype="fp32", max_steps=9, log_every=4, lr=1e-3, outputs=str(folder), tensorboard=False)
    settings = TrainSettings(model={"type": "STDiT3"}, **how)
    loader = PrefetchLoader(StepIndices(8), layout.data_rank, layout.data_size)
    one = Trainer(settings, model, loss, CPU, loader, layout)
    try:
        one.run()
    except SystemExit as end:
        return end.code, one.step
    return None, one.step


def on_two_ranks(folder: Path) -> list[Any]:
    cases = [(0, signal.SIGTERM), (1, signal.SIGUSR1), (1, signal.SIGHUP)]
    return [stopped(folder / str(index), *case) for index, case in enumerate(cases)]


def test_all_ranks_end_together(tmp_path: Path) -> None:
    """A signal reaches one of them alone."""
    for found in run(2, on_two_ranks, tmp_path):
        assert [code for code, _ in found] == [143, 138, 129]
        assert all(step == 3 for _, step in found)
    assert [path.name for path in sorted(tmp_path.glob("*/*/epoch*"))] == ["epoch0-global_step3"] * 3
