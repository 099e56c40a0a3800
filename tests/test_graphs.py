"""Graphs captured and replayed: a stand-in runs the same operations again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opensora.acceleration import cuda_graphs
from opensora.acceleration.cuda_graphs import MAX_GRAPHS, CapturedModel
from opensora.cli import main
from opensora.errors import ConfigError
from opensora.schedulers.rf import RFLOW
from tests.test_plain import error, inputs, models


class Tape(TorchDispatchMode):
    """What a graph of a device is: operations and the memory that they read and fill, without any program around it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # else a view, or in place
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Makes the package capture on tapes."""
    made: list[Tape] = []

    def capture(work: Callable[[], Tensor], _: torch.device) -> tuple[Callable[[], None], Tensor]:
        with Tape() as tape:
            out = work()
        made.append(tape)
        return tape.replay, out

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    return made


@pytest.mark.parametrize("apart", [False, True])
def test_a_request_of_replayed_steps_is_the_same(apart: bool, tapes: list[Tape]) -> None:
    model, _ = models()
    options = {"sequential_cfg": apart, "precompute": True}
    scheduler, given = RFLOW(num_sampling_steps=5, cfg_scale=3.0), inputs((3, 4, 6), given=False)
    told = {name: given[name] for name in ("fps", "height", "width")}
    captured = CapturedModel(model)
    with torch.inference_mode():
        for x, y in zip(given["x"].split(1), given["y"].split(1), strict=True):
            texts = {"y": y, **told}, {"y": model.null_caption(y)}
            made, expected = (scheduler.sample(one, x, *texts, **options) for one in (captured, model))
            assert error(made, expected) < 1e-6
    assert len(tapes) <= 2  # the second text is told to a graph of the first


def test_what_differs_is_another_graph_and_few_are_kept(tapes: list[Tape]) -> None:
    calls: list[int] = []

    def model(x: Tensor, timestep: Tensor, scale: float = 1.0) -> Tensor:
        calls.append(1)
        return x * timestep * scale

    captured, time = CapturedModel(model), torch.ones(1)
    for size in range(1, MAX_GRAPHS + 2):
        for turn in range(4):
            x = torch.full((size,), float(turn))
            assert torch.equal(captured(x, time + turn), x * (time + turn))
        assert len(calls) == 2 * size == 2 * len(tapes)
    assert len(captured.graphs) == MAX_GRAPHS
    held = captured(torch.ones(MAX_GRAPHS), time)
    assert torch.equal(captured(torch.ones(MAX_GRAPHS), time, scale=3.0), torch.full((MAX_GRAPHS,), 3.0))
    captured(torch.zeros(MAX_GRAPHS), time)
    assert torch.equal(held, torch.ones(MAX_GRAPHS))  # what was given is not filled again


def test_what_cannot_be_captured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(cuda_graphs, "capture", refuse)
    captured = CapturedModel(lambda x, timestep: x)
    captured(torch.ones(1), torch.ones(1))
    with pytest.raises(ConfigError, match=r"cannot be captured \(operation not permitted when stream is capt"):
        captured(torch.ones(1), torch.ones(1))


SMALL = ["--num-frames", "1", "--image-size", "64", "64", "--num-sampling-steps", "6"]


def test_the_flag_makes_the_same_image(tapes: list[Tape], tmp_path: Path) -> None:
    for name, flags in (("plain", []), ("graphs", ["--graphs"])):
        assert main(["generate", "a red circle", *SMALL, "--save-dir", str(tmp_path / name), *flags]) == 0
    plain, replayed = (Image.open(tmp_path / name / "sample_0000.png") for name in ("plain", "graphs"))
    assert len(tapes) == 2  # one of them is the trial at the start
    assert max(high for _, high in ImageChops.difference(plain, replayed).getextrema()) <= 1


@pytest.mark.parametrize(("flags", "said"), [([], "cannot capture graphs"), (["--memory", "low"], None)])
def test_the_flag_is_refused_where_nothing_records(
    flags: list[str], said: str | None, tmp_path: Path, request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if said is None:
        request.getfixturevalue("tapes")
    code = main(["generate", "a red circle", *SMALL, "--save-dir", str(tmp_path / "out"), "--graphs", *flags])
    if said is None:
        assert code == 0 and "no graphs are captured: --memory low offloads the weights" in caplog.text
    else:
        assert code != 0 and said in capsys.readouterr().err and not (tmp_path / "out").exists()
