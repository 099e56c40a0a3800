"""Published checkpoints in small: what our loader makes of them, against what the reference made of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.checkpoints.fit import load_weights
from opensora.checkpoints.key_mapping import POSITIONS, to_original
from opensora.checkpoints.read import read_state_dict
from opensora.errors import WeightsError
from opensora.registry import build
from tests.parity.cases import ROOT, Case, discover, needed, part

CASES = pytest.mark.parametrize("case", discover("checkpoints"), ids=str)
DEVICE = pytest.mark.parametrize("device", ["meta", "cpu"])


def model_of(case: Case, device: str = "cpu") -> nn.Module:
    """The target of a conversion, with the same initial values every time."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return build(dict(type=case.facts["target_model"], **case.facts["target_constructor"]))


def write(case: Case, folder: Path) -> Path:
    """The file as published, under a name that says nothing."""
    state, container = part(case.tensors(), "checkpoint/"), case.facts["container_key"]
    torch.save({container: state, "epoch": 1} if container else state, folder / "x.pth")
    return folder / "x.pth"


def expected(case: Case) -> dict[str, Tensor]:
    """What the reference loads: every tensor of the file that is not dropped, renamed and reshaped."""
    facts, tensors = case.facts, case.tensors()
    converted = part(tensors, "converted/")
    kept = {n: t for n, t in part(tensors, "checkpoint/").items() if n not in facts["dropped"]}
    return {facts["renamed"].get(name, name): converted.get(name, tensor) for name, tensor in kept.items()}


def missing(case: Case) -> list[str]:
    """The tensors that keep their initial values: all that the file lacks but the positions, which are computed."""
    return sorted(set(case.facts["missing_after_load"]).difference(POSITIONS))


@CASES
def test_tensors_and_lists_are_those_recorded(case: Case, tmp_path: Path) -> None:
    facts, model, initial = case.facts, model_of(case), model_of(case).state_dict()
    summary = load_weights(model, write(case, tmp_path), strict=False)
    state = model.state_dict()
    for name, tensor in expected(case).items():
        assert torch.equal(state[name], tensor), name
    for name in facts["missing_after_load"]:
        assert torch.equal(state[name], initial[name]), name
    assert {*expected(case), *facts["missing_after_load"]} == {*state}
    assert list(summary.dropped) == sorted(facts["dropped"])
    assert dict(summary.renamed) == facts["renamed"]
    assert sorted(summary.resized) == sorted(one["name"] for one in facts["reshaped"])
    assert sorted(summary.initial) == missing(case)
    assert sorted(summary.ignored) == sorted(facts["unexpected_after_load"])
    assert ("left at initial values" in str(summary)) == bool(missing(case))


@CASES
@DEVICE
def test_strict_loading_takes_whole_models_only(case: Case, device: str, tmp_path: Path) -> None:
    model, file = model_of(case, device), write(case, tmp_path)
    absent = missing(case)
    if absent:
        with pytest.raises(WeightsError, match=r"does not fit") as caught:
            load_weights(model, file)
        named = [name for name in absent if f"missing {name} float32 " in str(caught.value)]
        assert len(named) == min(len(absent), 10)
        assert not any(f"missing {name} " in str(caught.value) for name in POSITIONS)
        return
    load_weights(model, file, dtype=torch.bfloat16)
    state = model.state_dict()
    for name, tensor in expected(case).items():
        assert torch.equal(state[name], tensor.bfloat16()), name
    computed = {name for name in state if name in POSITIONS}
    assert computed == set(case.facts["missing_after_load"]) == set(model.positions())
    for name, tensor in model.positions().items():
        assert state[name].dtype == torch.float32 and torch.equal(state[name], tensor)


@pytest.mark.parametrize("case", [case for case in discover("checkpoints") if missing(case)], ids=str)
def test_what_is_missing_needs_initial_values(case: Case, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"strict=False needs a model with initial values"):
        load_weights(model_of(case, "meta"), write(case, tmp_path), strict=False)


@pytest.mark.parametrize("case", [case for case in discover("checkpoints") if case.facts.get("forward")], ids=str)
@DEVICE
def test_outputs(case: Case, device: str, tmp_path: Path) -> None:
    model = model_of(case, device).eval()
    load_weights(model, write(case, tmp_path))
    inputs: dict[str, Any] = part(case.tensors(), "forward/")
    outputs = [inputs.pop(name) for name in list(inputs) if name.endswith("output")]
    assert outputs
    image = inputs["x"].ndim == 4
    with torch.no_grad():
        found = model(**{**inputs, "x": inputs["x"].unsqueeze(2) if image else inputs["x"]})
    for output in outputs:
        torch.testing.assert_close(found.squeeze(2) if image else found, output, rtol=1e-4, atol=2e-5)


@CASES
def test_the_way_back_gives_the_published_file(case: Case) -> None:
    """All but the positions, and a table of texts that was resized."""
    published, back = part(case.tensors(), "checkpoint/"), to_original(expected(case))
    assert back.keys() == published.keys() - set(case.facts["dropped"])
    resized = {one["name"] for one in case.facts["reshaped"]} & {"y_embedder.y_embedding"}
    assert all(torch.equal(back[name], published[name]) for name in back.keys() - resized)


def test_a_patch_in_time_is_no_image_model(tmp_path: Path) -> None:
    case = needed([case for case in discover("checkpoints") if case.facts["target_model"] == "PixArt"], "PixArt file")
    settings = {**case.facts["target_constructor"], "input_size": (2, 8, 8), "patch_size": (2, 2, 2)}
    model = build(dict(type="PixArt", **settings))
    expected = f"x_embedder.proj.weight: expected float32 [{model.hidden_size}, {model.in_channels}, 2, 2, 2], found"
    with pytest.raises(WeightsError, match=re.escape(expected)):
        load_weights(model, write(case, tmp_path), strict=False)


RECORDED = json.loads((ROOT / "data" / "config.json").read_text())["v1.2.0"]
INDEX_FILE = "pytorch_model.bin.index.json"
SHARDED = [
    kind
    for kind, layout in RECORDED["sharded_folder_layout"].items()
    if isinstance(layout, dict) and INDEX_FILE in layout.get("files", [])
]


@pytest.mark.parametrize("kind", SHARDED)
def test_sharded_training_checkpoint(kind: str, tmp_path: Path) -> None:
    """The layout that the reference's trainer writes, read from the checkpoint, its model/, its index and ema.pt."""
    layout, checkpoint = RECORDED["sharded_folder_layout"][kind], RECORDED["checkpoint_folder"][-1]
    folder = tmp_path / checkpoint["folder"]
    for entry in checkpoint["entries"]:
        file = folder / entry / "pytorch_optim-00001.bin" if entry.endswith("/") else folder / entry
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (folder / "model" / "pytorch_optim-00001.bin").unlink()
    weight_map = layout["index"]["weight_map"]
    state = {name: torch.randn(3, 2) for name in weight_map}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name, held in weight_map.items() if held == file}, folder / "model" / file)
    (folder / "model" / INDEX_FILE).write_text(json.dumps(layout["index"]))
    torch.save({name: tensor + 1 for name, tensor in state.items()}, folder / "ema.pt")
    assert sorted(file.name for file in (folder / "model").iterdir()) == layout["files"]
    for source in (folder, folder / "model", folder / "model" / INDEX_FILE):
        found = read_state_dict(source)
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    assert all(torch.equal(tensor, state[name] + 1) for name, tensor in read_state_dict(folder / "ema.pt").items())
