"""Open-Sora's programs for data under their names: every flag runs as a command of `opensora`, or is refused with a
reason."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from opensora.cli.verbs import make_parser
from opensora.curation.stages.names import STAGE_NAMES
from opensora.errors import ConfigError
from tests.curation.footage import footage

ROOT = Path(__file__).parents[1]
TABLE = ["t.csv"]

# Program -> what it is called with, and each flag of the original's with a value.
PASSED = {
    "datasets.convert": ("convert", ["video", "root"], {"--output": "o.csv", "--split": "train", "--info": "i.csv"}),
    "datasets.datautil": ("edit", TABLE, {
        "--shard": "3", "--sort": "aes", "--sort-ascending": "aes", "--difference": "o.csv", "--intersection": "o.csv",
        "--update-text": "o.csv", "--train-column": None, "--shuffle": None, "--head": "3", "--info": None,
        "--video-info": None, "--ext": None, "--load-caption": "txt", "--relpath": "x", "--abspath": "x",
        "--path-to-id": None, "--path-subset": "x", "--remove-empty-path": None, "--filesize": None,
        "--remove-empty-caption": None, "--remove-url": None, "--lang": "en", "--remove-path-duplication": None,
        "--remove-text-duplication": None, "--refine-llm-caption": None, "--clean-caption": None,
        "--merge-cmotion": None, "--count-num-token": "t5", "--append-text": "x", "--score-to-text": None,
        "--fsmax": "1", "--fmin": "1", "--fmax": "1", "--hwmax": "1", "--aesmin": "1", "--matchmin": "1",
        "--flowmin": "1", "--fpsmax": "1", "--img-only": None, "--vid-only": None, "--output": "o.csv",
        "--format": "parquet", "--disable-parallel": None, "--num-workers": "1", "--seed": "1",
    }),
    "datasets.split": ("split", [*TABLE, "-o", "o.csv", "-c", "c.py"], {"-o": "p.csv", "-c": "d.py", "-l": "200"}),
    "datasets.analyze": ("analyze", TABLE, {"--save-img": "x", "--save_img": "x"}),
}  # fmt: skip
STAGE = {"--num_workers": "2", "--bs": "8"}
RUN = {
    "scene_cut.convert_id_to_path": ([*TABLE, "--folder_path", "x"], {"--num_workers": "2"}),
    "scene_cut.scene_detect": (TABLE, STAGE),
    "scene_cut.cut": (
        [*TABLE, "--save_dir", "x"],
        {
            "--min_seconds": "2",
            "--max_seconds": "20",
            "--target_fps": "24",
            "--shorter_size": "480",
            "--num_workers": "2",
        },
    ),
    "scoring.optical_flow": (TABLE, STAGE),
    "scoring.ocr": (TABLE, STAGE),
    "scoring.matching": (TABLE, {**STAGE, "--clip": "x"}),
    "scoring.aesthetic": (TABLE, {**STAGE, "--skip_if_existing": None, "--clip": "x", "--aesthetic": "x"}),
    "caption.caption_gpt4": (TABLE, {**STAGE, "--prompt": "x", "--model": "x", "--url": "x"}),
    "caption.caption_llava": (TABLE, {**STAGE, "--prompt": "x", "--model-path": "x", "--url": "x"}),
    "caption.caption_pllava": (TABLE, {**STAGE, "--prompt": "x", "--model-path": "x", "--url": "x"}),
    "caption.camera_motion": (TABLE, STAGE),
    "caption.camera_motion_detect": (TABLE, STAGE),
    "caption.caption_llama3": (TABLE, {"--output_prefix": "x"}),
}
REFUSED = {
    "datasets.transform": [
        [task, "meta.csv", "in", "out", *flag]
        for task in ("img_resize", "img_rand_crop", "vid_frame_extract")
        for flag in ([], ["--length", "3"], ["--points", "0.1", "0.9"], ["--points_index", "0"], ["--seed", "1"])
    ],
    "scene_cut.convert_id_to_path": [["t.csv", "--mode", "1", "--folder_path", "x"]],
    "caption.camera_motion": [["t.csv", "--threshold", "3"]],
    "caption.camera_motion_detect": [["t.csv", "--threshold", "3"]],
    "caption.caption_llama3": [["t.csv", "--key", "x"]],
    "caption.caption_gpt4": [["t.csv", "--key", "x"]],
    "caption.caption_llava": [["t.csv", "--tp-size", "2"], ["t.csv", "--dp-size", "2"]],
    "scoring.aesthetic": [["t.csv", "--num_frames", "5"]],
    "frame_interpolation": [
        ["v.mp4", *flag]
        for flag in ([], ["--ckpt", "x"], ["--niters", "1"], ["--fps", "24"], ["--output_path", "x"])
    ],
}  # fmt: skip


parser = cache(make_parser)


def flags(table: dict) -> list:
    return [pytest.param(name, flag, id=f"{name} {flag}") for name, (*_, own) in table.items() for flag in own]


@pytest.mark.parametrize(("name", "flag"), flags(PASSED))
def test_passed_on(name: str, flag: str) -> None:
    verb, argv, own = PASSED[name]
    assert importlib.import_module(f"tools.{name}").main
    value = own[flag]
    parser().parse_args(["data", verb, *argv, flag, *([] if value is None else [value])])


@pytest.mark.parametrize(("name", "flag"), flags(RUN))
def test_translated(name: str, flag: str) -> None:
    argv, own = RUN[name]
    door = importlib.import_module(f"tools.{name}").DOOR
    assert door.name == f"tools.{name}"
    command = door.translate([*argv, flag, *([] if own[flag] is None else [own[flag]])])
    assert command[0] == "data" and "t.csv" in command
    parser().parse_args(command)
    if "curate" in command:
        assert set(command[command.index("--stages") + 1].split(",")) <= set(STAGE_NAMES)
        assert flag != "--num_workers" or command[-2:] == ["--workers", "2"]


@pytest.mark.parametrize(("name", "argv"), [(name, argv) for name, cases in REFUSED.items() for argv in cases])
def test_refused(name: str, argv: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        importlib.import_module(f"tools.{name}").DOOR.translate(argv)
    assert "opensora" in str(error.value) or "train" in str(error.value)
    assert "\n" not in str(error.value)


def test_every_program_is_in_a_table_here_and_in_the_document() -> None:
    programs = {
        ".".join(file.relative_to(ROOT / "tools").with_suffix("").parts)
        for file in (ROOT / "tools").rglob("*.py")
        if file.stem not in ("__init__", "door")
    }
    assert programs == {*PASSED, *RUN, *REFUSED}
    document = (ROOT / "docs/data_processing.md").read_text(encoding="utf-8")
    assert not [name for name in programs if f"`tools.{name}`" not in document]
    assert not [flag for _, _, own in PASSED.values() for flag in own if "_" not in flag and f"{flag}" not in document]


def test_programs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "videos").mkdir()
    footage(tmp_path / "videos" / "two.mp4", (20, 20))
    program = [sys.executable, "-m", "tools.datasets.convert", "video", "videos", "--output", "t.csv"]
    subprocess.run(program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=300)
    monkeypatch.chdir(tmp_path)
    assert run("scene_cut.scene_detect", ["t.csv", "--num_workers", "0"], monkeypatch) == 0
    assert "same as: opensora data curate t.csv t_timestamp.csv --stages scenes --workers 0" in capsys.readouterr().err
    with open("t_timestamp.csv", newline="") as file:
        assert [row["num_frames"] for row in csv.DictReader(file)] == ["20", "20"]
    assert run("frame_interpolation", ["two.mp4"], monkeypatch) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def run(name: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [name, *argv])
    return importlib.import_module(f"tools.{name}").DOOR.run()
