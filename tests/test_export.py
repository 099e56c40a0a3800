"""Exporting trained models, and the stages that reproduce the embedded one."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opensora.checkpoints import builder
from opensora.config.settings import TrainSettings
from opensora.errors import WeightsError
from opensora.models.stdit.stdit3 import STDiT3
from opensora.training.checkpoint.export import export
from opensora.training.trainer import Trainer
from tests.full import some
from tests.test_resume import write_config
from tests.tiny import TINY_STDIT3, TINY_VAE, make_tiny_stdit3, make_tiny_t5, make_tiny_vae

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "misc" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path) -> Trainer:
    """A run of three steps, whose averaged weights differ from the last ones."""
    torch.manual_seed(0)
    model = STDiT3(**TINY_STDIT3)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        return sum((p - step).square().sum() for p in model.parameters() if p.requires_grad)

    settings = TrainSettings(
        model={"type": "STDiT3"}, outputs=str(tmp_path / "runs"), max_steps=3, ckpt_every=1, dtype="fp32",
        ema_decay=0.5, lr=0.1,
    )  # fmt: skip
    trainer = Trainer(settings, model, loss, CPU, 3)
    trainer.run()
    return trainer


@pytest.mark.parametrize("whole_experiment", [True, False])
@pytest.mark.parametrize("ema", [True, False])
@some(2)
def test_training_checkpoint(tmp_path: Path, run: Trainer, ema: bool, whole_experiment: bool) -> None:
    summary = export(run.folder if whole_experiment else run.saved, tmp_path / "out", ema)
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = (run.ema if ema else run.model).state_dict()
    assert written.keys() == expected.keys() and summary.tensors == len(expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "STDiT3"
    section = dict(type="STDiT3", from_pretrained=str(tmp_path / "out"))
    model, loaded = builder.load_component(section, "model", CPU, torch.float32)
    assert loaded.sha256 == summary.sha256 and model.config == run.model.config


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), (None, torch.float32)])
def test_precision(tmp_path: Path, name: str | None, dtype: torch.dtype) -> None:
    models = {"stdit3": make_tiny_stdit3(tmp_path / "stdit3"), "vae": make_tiny_vae(tmp_path / "vae")}
    for model, folder in models.items():
        export(folder, tmp_path / "out" / model, dtype=name and dtype)
    stdit3, vae = (load_file(tmp_path / "out" / model / "model.safetensors") for model in models)
    assert stdit3.pop("rope.freqs").dtype == vae.pop("shift").dtype == vae.pop("scale").dtype == torch.float32
    assert {tensor.dtype for tensor in (*stdit3.values(), *vae.values())} == {dtype}


def test_tokenizer_comes_along(tmp_path: Path) -> None:
    export(make_tiny_t5(tmp_path / "t5"), tmp_path / "out", dtype=torch.float16)
    section = dict(type="t5", from_pretrained=str(tmp_path / "out"))
    encoder, summary = builder.load_component(section, "text_encoder", CPU, torch.float32)
    features, mask = encoder.encode(["waves of the sea"])
    assert summary.dtypes == ("fp16",) and features.shape == (1, 1, mask.shape[1], 32)


def test_wrong_sources(tmp_path: Path) -> None:
    model = make_tiny_stdit3(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    for source, ema, words in (
        (tmp_path / "nowhere", True, "no training checkpoint at"),
        (tmp_path / "empty", True, "no finished checkpoint"),
        (model, False, "one set of weights; remove --no-ema"),
    ):
        with pytest.raises(WeightsError, match=words):
            export(source, tmp_path / "out", ema)
    with pytest.raises(WeightsError, match="name another folder"):
        export(model, model)


class TestReproduce:
    @pytest.fixture
    def reproduce(self) -> ModuleType:
        return script("reproduce_embedded")

    def test_stages_are_started_resumed_and_skipped(self, tmp_path: Path, reproduce: ModuleType) -> None:
        def planned(stage: str) -> list[list[str]]:
            return reproduce.plan(reproduce.RECIPES["shapes"], stage, tmp_path, ["--device", "cpu"], "fp16")

        config = str(ROOT / "configs" / "embedded" / "train" / "vae_2d.py")
        fresh = ["scripts/train_vae.py", config, "--outputs", str(tmp_path / "vae_2d"), "--device", "cpu"]
        assert planned("vae_2d") == [fresh]
        (tmp_path / "vae_2d" / "000-A").mkdir(parents=True)  # killed before its first checkpoint
        assert planned("vae_2d") == [fresh]
        (tmp_path / "vae_2d" / "001-A" / "epoch0-global_step2").mkdir(parents=True)
        assert planned("vae_2d") == [[*fresh, "--load", str(tmp_path / "vae_2d" / "001-A")]]
        (tmp_path / "vae_2d" / "ema").mkdir()
        assert planned("vae_2d") != []
        (tmp_path / "vae_2d" / "ema" / "config.json").write_text("{}")
        assert planned("vae_2d") == []
        (export_text, *_), text = planned("export"), str(tmp_path / "text_encoder" / "ema")
        assert export_text[:2] == ["scripts/misc/export.py", text] and export_text[3:] == ["--dtype", "fp16"]
        captions = ["--captions", "shapes"]
        assert planned("text_encoder") == [["scripts/train_text_encoder.py", "--output", text, *captions]]

    def test_either_size_takes_up_the_stages_of_the_other(self, tmp_path: Path, reproduce: ModuleType) -> None:
        world = reproduce.RECIPES["world"]
        for stage in filter(lambda stage: stage.config.endswith(".py"), world.stages.values()):
            assert (reproduce.CONFIGS / stage.config).is_file()
            assert (reproduce.CONFIGS / reproduce.smaller(stage).config).is_file()
        (tmp_path / "vae_video" / "ema").mkdir(parents=True)
        (tmp_path / "vae_video" / "ema" / "config.json").write_text("{}")
        (small,) = reproduce.plan(
            world._replace(stages={name: reproduce.smaller(stage) for name, stage in world.stages.items()}),
            "vae_decoder", tmp_path, [], "fp16",
        )  # fmt: skip
        assert "cpu" in Path(small[1]).parts and str(tmp_path / "vae_video" / "ema") in small
        with pytest.raises(SystemExit):
            reproduce.main(["--small"])

    def test_failure_stops(self, tmp_path: Path, reproduce: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        ran: list[Sequence[str]] = []
        monkeypatch.setattr(reproduce, "run", lambda command: ran.append(command) or len(ran) - 1)
        assert reproduce.main(["--outputs", str(tmp_path)]) == 1
        assert [command[0] for command in ran] == ["scripts/train_text_encoder.py", "scripts/train_vae.py"]

    @pytest.mark.parametrize("model", ["world", "shapes"])
    @some(1)
    def test_miniature(
        self, tmp_path: Path, reproduce: ModuleType, monkeypatch: pytest.MonkeyPatch, model: str
    ) -> None:
        """All stages but the text encoder, three steps each, in this process; then once more with nothing to do."""
        outputs, embedded, ran = tmp_path / "out'puts", tmp_path / "embedded", []

        def run(command: Sequence[str]) -> int:
            ran.append(command[0])
            monkeypatch.setattr(sys, "argv", list(command))
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(ROOT / command[0]), run_name="__main__")
            return end.value.code

        monkeypatch.setattr(reproduce, "run", run)
        monkeypatch.setattr(reproduce, "CONFIGS", tmp_path)
        monkeypatch.setattr(reproduce, "EMBEDDED", embedded)
        monkeypatch.setattr("opensora.training.autoencoder.STATISTICS_CLIPS", 4)
        make_tiny_t5(outputs / "text_encoder" / "ema")
        write_miniature_configs(tmp_path)
        command = ["--model", model, "--outputs", str(outputs)]
        assert reproduce.main([*command, "--device", "cpu", "--dtype", "fp32"]) == 0
        train, train_vae = "scripts/train.py", "scripts/train_vae.py"
        trained = {"shapes": [*[train_vae] * 2, *[train] * 3, train_vae], "world": [*[train_vae] * 3, *[train] * 2]}
        exports = ["scripts/misc/export.py"] * 3
        assert ran == [*trained[model], *exports]
        below = embedded / "world" if model == "world" else embedded
        vae = load_file(below / "vae" / "model.safetensors")
        assert vae["shift"].dtype == torch.float32 and vae["shift"].shape == (1, 4, 1, 1, 1)
        section = dict(type="STDiT3", from_pretrained=str(below / "stdit3"))
        builder.load_component(section, "model", CPU, torch.float32)
        ran.clear()
        assert reproduce.main(command) == 0
        assert ran == exports


def write_miniature_configs(folder: Path) -> None:
    short: dict[str, Any] = dict(max_steps=3, perceptual_loss_weight=0.0)
    clips = dict(type="ShapeClips", num_frames=5, image_size=(16, 16))
    autoencoder = dict(type="VideoAutoencoderPipeline", **TINY_VAE)
    write_config(folder / "vae_2d.py", dataset=clips, model=autoencoder, **short)
    write_config(
        folder / "vae_temporal.py",
        dataset=clips,
        model={**autoencoder, "freeze_vae_2d": True},
        use_z_rec_loss=True,
        **short,
    )
    write_config(
        folder / "vae_decoder.py",
        dataset=clips,
        model=autoencoder,
        freeze_encoders=True,
        restorer=dict(type="STDiT3"),
        text_encoder=dict(type="t5", model_max_length=32),
        **short,
    )
    for name in ("stdit3", "stdit3_masks", "stdit3_extend", "stdit3_correct"):
        write_config(
            folder / f"{name}.py",
            dataset=clips | dict(num_clips=4, features="to be set"),
            model=dict(type="STDiT3", **TINY_STDIT3),
            vae=dict(type="VideoAutoencoderPipeline"),
            text_encoder=dict(type="t5", model_max_length=32),
            scheduler=dict(type="rflow"),
            **short,
        )
    write_miniature_world(folder)


def write_miniature_world(folder: Path) -> None:
    """The configurations of the drawn world, with tiny models and few small clips."""
    (folder / "world").mkdir()
    short: dict[str, Any] = dict(max_steps=3, num_workers=0, compile=False, batch_size=1, log_every=1)
    autoencoder = dict(type="VideoAutoencoderPipeline", _delete_=True, **TINY_VAE)
    window = dict(image_size=(32, 32), crop=(16, 16))
    sizes = dict(sizes=[(17, 16, 24, 0.5), (1, 24, 16, 0.5)], num_clips=5)
    changes: dict[str, dict[str, Any]] = {
        "vae_frames": dict(dataset=window, model=autoencoder),
        "vae_video": dict(dataset=window, model=autoencoder),
        "vae_decoder": dict(dataset=dict(sizes=sizes["sizes"]), model=autoencoder),
        "stdit3": dict(dataset=dict(image_size=(16, 24), num_clips=4)),
        "stdit3_masks": dict(dataset=dict(continued=[(34, 16, 24, 0.5)], **sizes)),
    }
    for name, changed in changes.items():
        if name.startswith("stdit3"):
            changed |= dict(
                model=dict(type="STDiT3", _delete_=True, **TINY_STDIT3),
                text_encoder=dict(model_max_length=32),
            )
        base = str(ROOT / "configs" / "embedded" / "train" / "world" / f"{name}.py")
        write_config(folder / "world" / f"{name}.py", _base_=base, **changed, **short)
