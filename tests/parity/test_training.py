"""Learning rates, running averages and the folders of a training run, against what v1.2.0 recorded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from opensora.cli.flags import boolean
from opensora.config.settings import TrainSettings
from opensora.distributed.process_group import RankLayout
from opensora.training.checkpoint import folders, write
from opensora.training.checkpoint.snapshot import take_snapshot
from opensora.training.ema import EMA
from opensora.training.trainer import Trainer
from tests.parity.cases import ROOT

MISC = json.loads((ROOT / "data" / "training_misc.json").read_text())
FOLDERS = json.loads((ROOT / "data" / "config.json").read_text())["v1.2.0"]
NOT_REPRODUCED = {"number_format", "duration_format"}  # how the log of v1.2.0 spells numbers
FUNCTION_OF_STEP = {"lr_scheduler", "sampler"}  # files that a run here does not need: both follow from global_step


def test_every_kind_is_covered() -> None:
    assert set(MISC) - {"version"} == NOT_REPRODUCED | {"linear_warmup", "ema_update", "dtype_names", "boolean_flag"}


def settings(outputs: Path, **values: Any) -> TrainSettings:
    return TrainSettings(model={"type": "Linear"}, outputs=str(outputs), **values)


@pytest.mark.parametrize("case", MISC["linear_warmup"], ids=lambda case: str(case["warmup_steps"]))
def test_linear_warmup(case: dict[str, Any], tmp_path: Path) -> None:
    for group, lr in enumerate(case["base_lr"]):
        asked = settings(tmp_path, lr=lr, warmup_steps=case["warmup_steps"])
        trainer = Trainer(asked, nn.Linear(1, 1), lambda *_: torch.zeros(()), torch.device("cpu"), 1)
        rates = [trainer.learning_rate(step) for step in range(len(case["lr_used_at_step"]))]
        assert rates == pytest.approx([used[group] for used in case["lr_used_at_step"]], rel=1e-12)


@pytest.mark.parametrize("case", MISC["ema_update"], ids=lambda case: str(case["decay"]))
def test_ema_update(case: dict[str, Any]) -> None:
    model = nn.Module()
    for name, value in case["model"].items():
        if name in case["requires_grad"]:
            model.register_parameter(name, nn.Parameter(torch.tensor(value), case["requires_grad"][name]))
        else:
            model.register_buffer(name, torch.tensor(value))
    ema = EMA(model, case["decay"])
    ema.load_state_dict({name: torch.tensor(value) for name, value in case["ema_before"].items()})
    for _ in range(case["updates"]):
        ema.update()
    assert ema.state_dict().keys() == case["ema_after"].keys()
    for name, value in case["ema_after"].items():
        torch.testing.assert_close(ema.state_dict()[name], torch.tensor(value), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", MISC["dtype_names"], ids=lambda case: str(case["in"]))
def test_dtype_names(case: dict[str, Any], tmp_path: Path) -> None:
    long = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    if case["in"] == "bfloat16":
        case = {"in": "bfloat16", "out": "bfloat16"}  # C10 calls its absence a quirk
    if "error" in case:
        with pytest.raises(ValueError, match="dtype"):
            settings(tmp_path, dtype=case["in"])
    else:
        dtype = settings(tmp_path, dtype=case["in"]).dtype
        assert long.get(dtype, dtype) == case["out"]


@pytest.mark.parametrize("case", MISC["boolean_flag"], ids=lambda case: repr(case["in"]))
def test_boolean_flag(case: dict[str, Any]) -> None:
    if "error" in case:
        with pytest.raises(Exception, match="neither true nor false") as raised:
            boolean(case["in"])
        assert raised.type.__name__ == case["error"]
    else:
        assert boolean(case["in"]) is case["out"]


@pytest.mark.parametrize("case", FOLDERS["experiment_folder"], ids=lambda case: f"{case['existing']}{case['name']}")
def test_experiment_folder(case: dict[str, Any], tmp_path: Path) -> None:
    for name in case["existing"]:
        (tmp_path / name).mkdir()
    made = folders.new_run_folder(str(tmp_path / ("" if case["existing"] else "new")), case["model_type"])
    recorded = re.fullmatch(r"(\d+)(-.*)", case["name"])
    numbers = [int(name[:3]) for name in case["existing"] if re.match(r"\d{3}-", name)]
    number = max(numbers, default=-1) + 1  # C9: v1.2.0 counts entries, and so takes a number twice after a removal
    assert made.is_dir() and made.name == f"{number:03d}{recorded[2]}"
    if numbers == list(range(len([name for name in case["existing"] if not name.startswith(".")]))):
        assert made.name == case["name"]


@pytest.mark.parametrize("case", FOLDERS["checkpoint_folder"], ids=lambda case: str(case["arguments"]))
def test_checkpoint_folder(case: dict[str, Any], tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    position = {name: value for name, value in case["arguments"].items() if name not in FUNCTION_OF_STEP}
    snapshot = take_snapshot(model, EMA(model, 0.9), optimizer, scaler, RankLayout())
    made = write.write_checkpoint(tmp_path, snapshot, {}, position, keep=1)
    assert made == tmp_path / case["folder"]
    entries = {path.name + "/" * path.is_dir() for path in made.iterdir()}
    assert entries == set(case["entries"]) - FUNCTION_OF_STEP
    assert json.loads((made / "running_states.json").read_text()) == case["running_states.json"]
    assert list(torch.load(made / "ema.pt", weights_only=True)) == case["ema.pt_keys_for_a_linear_layer"]
