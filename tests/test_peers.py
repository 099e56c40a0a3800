"""Ranks whose launcher or peers are gone: each ends soon, and says so in one line."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora.config.settings import TrainSettings
from opensora.distributed import failures
from opensora.distributed.collectives import all_reduce_sum, barrier, broadcast_object, run_on_main
from opensora.distributed.failures import report_first_failure
from opensora.distributed.process_group import start
from opensora.errors import ConfigError, OpenSoraError, WeightsError
from opensora.training.data.loader import PrefetchLoader, StepIndices
from opensora.training.trainer import Trainer
from tests.full import some
from tests.ranks import End, ends, run

CPU = torch.device("cpu")


def train_until(folder: Path, who: int, what: Callable[[], Any]) -> None:
    """A training in whose third step something happens to one rank."""
    layout = start(CPU)
    model = nn.Linear(4, 4)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        if one.step == 2 and layout.rank == who:
            what()
        return model(torch.randn(8, 4, generator=generator)).square().mean()

    how = dict(dtype="fp32", max_steps=9, outputs=str(folder), tensorboard=False, ckpt_every=1)
    one = Trainer(TrainSettings(model={"type": "Linear"}, **how), model, loss, CPU,
                  PrefetchLoader(StepIndices(8), layout.data_rank, layout.data_size), layout)  # fmt: skip
    with report_first_failure():
        one.run()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(7)


def fail() -> None:
    raise WeightsError("no luck")


def told(end: End) -> list[str]:
    """The lines of errors, those of the bar left out; AssertionError for a traceback."""
    assert "Traceback" not in end.stderr, end.stderr
    lines = [line for line in end.stderr.replace("\r", "\n").splitlines() if "step/s" not in line and line.strip()]
    return [line for line in lines if "s/step" not in line]


@pytest.mark.parametrize(("who", "what"), [(0, die), (1, die), (1, leave)])
@some(2)
def test_a_rank_that_is_gone(tmp_path: Path, who: int, what: Callable[[], None]) -> None:
    began = time.monotonic()
    found = ends(2, train_until, tmp_path, who, what)
    assert time.monotonic() - began < 200
    assert found[who].code == (7 if what is leave else -signal.SIGKILL) and found[1 - who].code == 1
    (line,) = told(found[1 - who])
    assert line.startswith(f"error: rank {1 - who} has lost another rank (") and "resume training with --load" in line


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_fails_speaks_for_all(tmp_path: Path, who: int) -> None:
    found = ends(2, train_until, tmp_path, who, fail)
    assert [end.code for end in found] == [1, 1]
    assert told(found[who]) == ["error: no luck"] and told(found[1 - who]) == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3"),
        RuntimeError("[/pytorch/third_party/gloo/gloo/unbound_buffer.cc:81] Timed out waiting 1000ms for recv"),
        RuntimeError("Application timeout caused pair closure"),
        dist.DistBackendError("NCCL error: remote process exited or there was a network error\nLast error:\n1\n2"),
        dist.DistNetworkError("The client socket has timed out\nframe #0\nframe #1"),
    ],
)
def test_errors_of_every_back_end_are_known(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("RANK", "1")
    outer = RuntimeError("while it was computed")
    outer.__cause__ = error
    for one in (error, outer):
        assert "\n" not in str(failures.lost_rank_error(one)) and str(failures.lost_rank_error(one)).startswith(
            "rank 1 has lost another rank"
        )
    for other in (RuntimeError("shape [2] is invalid"), ValueError("connection closed"), WeightsError("x")):
        assert failures.lost_rank_error(other) is None


LAUNCHED = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@LAUNCHED
@pytest.mark.parametrize("obeys", [True, False])
@pytest.mark.parametrize("launched", [True, False])
def test_a_launcher_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obeys: bool, launched: bool) -> None:
    """Its ranks end by SIGTERM, and by force when they do not; what torchrun has not started stays."""
    monkeypatch.setattr(failures, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(failures, "GRACE_SECONDS", 60 if obeys else 0.1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x") if launched else monkeypatch.delenv("TORCHELASTIC_RUN_ID", False)
    file, (wait, told_by), (started, starts) = tmp_path / "stderr", os.pipe(), os.pipe()
    if not (launcher := os.fork()):
        if not os.fork():
            sys.stderr = file.open("w")
            signal.signal(
                signal.SIGTERM, (lambda *_: os._exit(os.write(told_by, b"saved") * 0)) if obeys else signal.SIG_IGN
            )
            parent = os.getppid()
            failures.exit_with_launcher()
            os.write(starts, b"!")
            while os.getppid() == parent:
                time.sleep(0.01)
            time.sleep(60 if launched else 0.3)
            os._exit(os.write(told_by, b"went on") * 0)
        os.read(started, 1)
        os._exit(0)
    os.waitpid(launcher, 0)
    os.close(told_by)
    found = os.read(wait, 100)
    assert found == ((b"saved" if obeys else b"") if launched else b"went on")
    lines = file.read_text().splitlines()  # of the rank alone
    assert lines == (["error: rank 0: the process that started it has ended, so this rank exits"] if launched else [])


def on_ranks() -> dict[str, Any]:
    layout = start(CPU)

    def refuse() -> None:
        raise WeightsError("broken")

    found: dict[str, Any] = {"total": all_reduce_sum([layout.rank + 1, 0.5], layout)}
    found["made"] = run_on_main(lambda: f"by {layout.rank}", layout)
    try:
        run_on_main(refuse, layout)
    except OpenSoraError as error:
        found["refused"] = f"{type(error).__name__} {error}"
    barrier(layout)
    return found | {"shared": broadcast_object(layout.rank, layout)}


def test_what_ranks_tell_one_another() -> None:
    expected = {"total": [3.0, 1.0], "made": "by 0", "refused": "WeightsError broken", "shared": 0}
    assert run(2, on_ranks) == [expected, expected]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE"), ({"WORLD_SIZE": "0"}, "WORLD_SIZE"), ({"WORLD_SIZE": "2.5"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"), ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK"), ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "9" * 5000, "RANK": "0"}, "WORLD_SIZE"),
    ],
)  # fmt: skip
def test_an_environment_without_ranks(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words) as raised:
        start(CPU)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
