"""Training, extraction and export as programs call them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import opensora.training
from opensora.config.settings import ExtractSettings, TrainSettings
from opensora.errors import ConfigError, WeightsError
from opensora.training import TrainResult
from opensora.training.run import settings_of
from tests.tiny import TINY_VAE

CONFIG: dict[str, Any] = dict(
    model=dict(type="VideoAutoencoderPipeline", **TINY_VAE), perceptual_loss_weight=0.0, batch_size=1, dtype="fp32",
    dataset=dict(type="ShapeClips", num_frames=1, image_size=(16, 16), num_clips=2), device="cpu", tensorboard=False,
)  # fmt: skip


def test_a_run_resumes_and_is_exported(tmp_path: Path) -> None:
    first = opensora.training.train(CONFIG, max_steps=1, outputs=str(tmp_path))
    assert first == TrainResult(
        tmp_path / "000-VideoAutoencoderPipeline", 1, first.folder / "epoch1-global_step1", tmp_path / "ema"
    )
    rest = opensora.training.train(CONFIG, max_steps=2, outputs=str(tmp_path), load=str(first.folder))
    assert rest.folder == first.folder and rest.step == 2 and rest.path == rest.model
    summary = opensora.training.export(rest.folder, tmp_path / "exported", dtype="fp16")
    assert (tmp_path / "exported" / "model.safetensors").is_file() and "fp16" in str(summary)


def test_an_interrupted_run_has_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr("opensora.training.trainer.time.monotonic", lambda: next(now))
    run = opensora.training.train(CONFIG, max_steps=9, max_minutes=1, log_every=1, outputs=str(tmp_path))
    assert 0 < run.step < 9 and run.model is None and run.path == run.checkpoint


@pytest.mark.parametrize("config", ["embedded/train/finetune", "configs/embedded/train/finetune.py"])
def test_overrides_are_merged_into_sections(config: str) -> None:
    settings = settings_of(TrainSettings, config, {"dataset": {"data_path": "own.csv"}, "max_steps": 3})
    plain = settings_of(TrainSettings, config, {})
    assert settings.max_steps == 3 and settings.dataset == {**plain.dataset, "data_path": "own.csv"}
    assert settings_of(TrainSettings, plain, {"dataset": {"data_path": "own.csv"}, "max_steps": 3}) == settings


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown setting 'max_step'"):
        opensora.training.train(CONFIG, max_step=3)
    with pytest.raises(ConfigError, match="unknown setting 'max_step'; did you mean 'max_steps'"):
        opensora.training.train(TrainSettings(model={"type": "STDiT3"}), max_step=3)
    with pytest.raises(ConfigError, match="does not exist"):
        opensora.training.extract("no-such-configuration")
    with pytest.raises(ConfigError, match="dtype 'int8' is not known"):
        opensora.training.export(tmp_path, tmp_path / "out", dtype="int8")
    with pytest.raises(WeightsError, match="holds no finished checkpoint"):
        opensora.training.export(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="give ExtractSettings"):
        settings_of(ExtractSettings, TrainSettings(model={"type": "STDiT3"}), {})
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        opensora.training.trian  # noqa: B018


def test_the_package_imports_nothing_heavy() -> None:
    program = "import sys, opensora.training; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1]).returncode == 0
