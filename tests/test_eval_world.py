"""The evaluation of models of the drawn world, as a program."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def evaluation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("eval_world", ROOT / "scripts" / "misc" / "eval_world.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rendered_and_reconstructed_clips(
    tmp_path: Path, evaluation: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    command = ["--num-prompts", "2", "--size", "5x64x64", "--save-dir", str(tmp_path)]
    assert evaluation.main([*command, "--source", "rendered"]) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["figures"]["all"]["thing"] == 100 and (tmp_path / "evaluation.png").is_file()
    assert evaluation.main([*command, "--source", "autoencoder"]) == 0
    assert "dB mean" in capsys.readouterr().out
    psnr = json.loads((tmp_path / "evaluation.json").read_text())["psnr"]
    assert 5 < psnr["least"] <= psnr["mean"] < 50
    assert evaluation.main([*command, "--source", "files"]) == 0


def test_missed_bars_are_named(evaluation: ModuleType) -> None:
    right = {"thing": True, "colour": True, "motion": True, "scene": True, "all together": True}
    good = {"right": right, "held_out": False, "two": False, "flaws": {"edge": 0.9, "melts": False}}
    rows = [good, {**good, "held_out": True}]
    assert evaluation.find_failures(evaluation.figures(rows)) == []
    wrong = {"held_out": True, "right": {**right, "thing": False, "all together": False}, "two": False}
    wrong["flaws"] = {"edge": 0.4, "melts": True}
    missed = "; ".join(evaluation.find_failures(evaluation.figures([*rows, wrong])))
    assert "thing 66.7 % (bar 93 %)" in missed and "held out 50.0 % (trained 100.0 %)" in missed
    assert "melts 33.3 %" in missed
