"""Training of adapters: the base stays, checkpoints hold the adapter alone, and runs resume and spread over ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.acceleration.quantization import EightBitLinear
from opensora.checkpoints.lora import FILE, adapter_hash, read_layers
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.save import save_pretrained
from opensora.checkpoints.summary import content_hash
from opensora.config.settings import TrainSettings
from opensora.errors import ConfigError, WeightsError
from opensora.models.lora import LoRAWeights, linear_layers
from opensora.training.checkpoint.export import export
from opensora.training.diffusion import train
from opensora.training.trainer import Trainer
from tests import killing
from tests.full import FULL, some
from tests.ranks import run
from tests.test_kill import table_config
from tests.tiny import TINY_STDIT3, make_tiny_stdit3

LORA = {"rank": 2, "alpha": 3.0, "targets": ["attn.qkv", "cross_attn.*", "mlp.fc2"]}
CALM = {"adam_eps": 1e-3}  # else AdamW turns rounding of gradients near zero into whole steps
SCRIPT = "scripts/train.py"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of images, tiny encoders, and a tiny base in half precision."""
    folder = tmp_path_factory.mktemp("parts")
    table_config(folder)
    base = make_tiny_stdit3(folder / "fp32", depth=1)
    config = json.loads((base / "config.json").read_text())
    save_pretrained({n: t.half() for n, t in read_state_dict(base).items()}, folder / "base", config)
    return folder


def make_settings(parts: Path, outputs: Path, **changes: Any) -> TrainSettings:
    data = {"type": "VideoTextDataset", "data_path": str(parts / "table.csv"), "num_frames": 1, "image_size": (16, 16)}
    model = {"type": "STDiT3", **TINY_STDIT3, "depth": 1, "from_pretrained": str(parts / "base")}
    settings: dict[str, Any] = dict(
        dataset=data, model=model, vae={"type": "VideoAutoencoderPipeline", "from_pretrained": str(parts / "vae")},
        text_encoder={"type": "t5", "from_pretrained": str(parts / "t5"), "model_max_length": 32},
        scheduler={"type": "rflow"}, dtype="fp32", device="cpu", num_workers=0, max_steps=3, lr=1e-2, ema_decay=0.5,
        tensorboard=False, outputs=str(outputs), batch_size=2, lora=LORA, log_every=1,
    )  # fmt: skip
    return TrainSettings(**{**settings, **changes})


def result(outputs: Path) -> LoRAWeights:
    """The averaged adapter of a finished run."""
    return read_layers(outputs / "ema")


def lines_of(outputs: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in next(outputs.glob("0*/log.jsonl")).read_text().splitlines()]


def test_only_the_adapter_is_trained_and_saved(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear layers of the blocks keep the type of the file; optimizer, EMA and files are of the adapter."""
    trainers: list[Trainer] = []
    before = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: trainers.append(self) or before(self))
    ended = train(make_settings(parts, tmp_path, validate_every=2, validation_samples=2))
    model = trainers[0].model
    adapted = {name: layer for name, layer in linear_layers(model).items() if layer.adapters()}
    assert len(adapted) == 2 * 5 and all(layer.weight.dtype == torch.float16 for layer in adapted.values())
    own = {name: p for name, p in model.named_parameters() if ".lora_default." in name}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(own)
    optimization = trainers[0].optimization
    assert len(optimization.parameters) == len(optimization.ema.shadow) == len(own) == 20
    base = read_state_dict(parts / "base")
    for name, tensor in model.state_dict().items():
        if name in base:
            assert torch.equal(tensor.half(), base[name]), name
    assert sorted(path.name for path in (ended.checkpoint / "model").iterdir()) == [FILE]
    saved = read_layers(ended.checkpoint / "model")
    assert saved.base == content_hash(base) and {layer.alpha for layer in saved.layers.values()} == {3.0}
    assert all(torch.equal(own[f"{name}.lora_default.B"], one.B) for name, one in saved.layers.items())
    assert ended.model is not None and set(result(tmp_path).layers) == set(saved.layers)
    assert any(one.B.any() for one in saved.layers.values())


def test_exported_adapters_are_those_of_the_run(parts: Path, tmp_path: Path) -> None:
    ended = train(make_settings(parts, tmp_path / "run"))
    export(ended.folder, tmp_path / "averaged", dtype=torch.float16)
    export(ended.folder, tmp_path / "last", ema=False)
    export(tmp_path / "run" / "ema", tmp_path / "again")
    averaged = read_layers(tmp_path / "averaged")
    for name, one in result(tmp_path / "run").layers.items():
        assert torch.equal(averaged.layers[name].B, one.B.half()) and averaged.layers[name].alpha == 3.0
    last = ended.checkpoint / "model"
    assert adapter_hash(read_layers(tmp_path / "last")) == adapter_hash(read_layers(last))
    assert adapter_hash(read_layers(tmp_path / "again")) == adapter_hash(result(tmp_path / "run"))


def on_ranks(parts: Path, outputs: Path, sp_size: int) -> None:
    train(
        make_settings(parts, outputs, sp_size=sp_size, batch_size=2 if sp_size > 1 else 1, grad_checkpoint=True, **CALM)
    )


@pytest.mark.parametrize("sp_size", [2, 1])
@some(1)
def test_two_ranks_learn_what_one_learns(parts: Path, tmp_path: Path, sp_size: int) -> None:
    """FSDP2 with a frozen base in half precision, and sequence parallelism, with activation checkpointing."""
    run(2, on_ranks, parts, tmp_path / "two", sp_size)
    accumulation = {} if sp_size > 1 else {"accumulation_steps": 2, "batch_size": 1}
    train(make_settings(parts, tmp_path / "one", **accumulation, **CALM))
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    assert two.base == one.base
    for first, second in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)
    ours, theirs = (torch.cat([t.flatten() for one in w.layers.values() for t in one[:2]]) for w in (one, two))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_resumed_run_ends_like_a_whole_one(parts: Path, tmp_path: Path) -> None:
    train(make_settings(parts, tmp_path / "whole", max_steps=4))
    first = train(make_settings(parts, tmp_path / "resumed", max_steps=2))
    train(make_settings(parts, tmp_path / "resumed", max_steps=4, load=str(first.folder)))
    assert adapter_hash(result(tmp_path / "resumed")) == adapter_hash(result(tmp_path / "whole"))


@pytest.mark.skipif(not FULL, reason="tests/test_resume.py kills runs: set OPENSORA_FULL=1")
def test_a_killed_run_resumes_exactly(parts: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments; the adapter and its average are those of the uninterrupted run, bit for bit."""
    kills = 20
    model = {"type": "STDiT3", **TINY_STDIT3, "depth": 1, "from_pretrained": str(parts / "base")}
    config = table_config(tmp_path, max_steps=4 * kills + 4, model=model, lora=LORA)
    killing.run(SCRIPT, config, tmp_path / "whole")
    assert len(killing.run(SCRIPT, config, tmp_path / "killed", 0, kills)) == kills
    assert adapter_hash(result(tmp_path / "killed")) == adapter_hash(result(tmp_path / "whole"))


@pytest.mark.parametrize("linear", ["int8", "fp8"])
@some(1)
def test_a_base_of_8_bits(parts: Path, tmp_path: Path, linear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny_stdit3(tmp_path / "wide", depth=1, hidden_size=128)
    model = {"type": "STDiT3", **TINY_STDIT3, "depth": 1, "hidden_size": 128, "from_pretrained": str(base)}
    models: list[torch.nn.Module] = []
    before = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: models.append(self.model) or before(self))
    for name in ("exact", linear):
        train(make_settings(parts, tmp_path / name, model=model, linear=name, max_steps=2))
    small = [layer for layer in linear_layers(models[1]).values() if isinstance(layer, EightBitLinear)]
    assert len(small) >= 14 and sum(bool(layer.adapters()) for layer in small) == 10
    for one, other in zip(lines_of(tmp_path / "exact"), lines_of(tmp_path / linear), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02)


def test_what_cannot_be_trained_is_refused(parts: Path, tmp_path: Path) -> None:
    ended = train(make_settings(parts, tmp_path / "run", max_steps=1))
    plain = {"type": "STDiT3", **TINY_STDIT3, "depth": 1}
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("lora adapts a trained model", {"model": plain}),
        ("cannot be trained", {"lora": None, "linear": "int8"}),
        ("matches no linear layer", {"lora": {"targets": ["attn.q"]}}),
        ("must be 1 to", {"lora": {"rank": 4096}}),
        ("its model does not fit STDiT3", {"lora": {**LORA, "rank": 3}, "load": str(ended.folder), "max_steps": 2}),
    ]
    for message, changes in wrong:
        with pytest.raises((ConfigError, WeightsError), match=message):
            train(make_settings(parts, tmp_path / "wrong", **changes))
    for bad in ({"rank": 0}, {"rank": "many"}, {"targets": []}, {"ranks": 4}, {"alpha": -1.0}):
        with pytest.raises(ConfigError, match="lora"):
            make_settings(parts, tmp_path, lora=bad)
