"""The command `opensora`: its verbs, what they print, and what they cost before any work is done."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from opensora import __version__
from opensora.cli import main
from opensora.config.settings import TrainSettings
from opensora.datasets.video import read_image
from opensora.training.result import TrainResult
from tests.checkpoints import SAMPLE, snapshot

SMALL = ("--num-sampling-steps", "2", "--image-size", "16", "24", "--num-frames", "17")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


HEAVY = {"torch", "numpy", "transformers", "diffusers", "av", "PIL", "huggingface_hub", "bs4", "ftfy"}
# What can be said and refused without a library: each with its exit status.
LIGHT = {
    0: (
        "--help", "generate --help", "generate --help-all", "extract --help", "benchmark --help", "doctor --help",
        "models",
    ),
    2: ("", "doctro", "generate x --seed y", "generate x --widht 3", "train --steps 3", "inspect", "continue"),
    1: (
        "generate x --model embeded", "generate a red circle", "generate",
        "generate x --width 64", "generate x --save-fps 0",
        "generate x --num-frames 0", "generate x --resolution huge --aspect-ratio 9:16", "generate x --image-size 4 4",
        "generate x --cfg-options model.type=STDiT4", "generate x --cfg-options scheduler.type=ddim",
        "generate x --cfg-options vae=None", "generate x --cfg-options num_frame=3", "generate --prompt-path gone.txt",
        "generate x --image gone.png", "generate x --reference-path gone.mp4", "generate x --ckpt-path a/b/gone.pt",
        "plan x --vae-path ./gone", "plan x --extend gone.mp4", "benchmark x --edit gone.mp4",
        "continue gone.draft.safetensors", "replay gone.mp4", "inspect gone.mp4", "convert gone.pt x.pt --to pt",
        "export gone out", "table gone out.csv", "buckets gone.csv embedded/train/finetune_buckets",
        "train gone.py", "train embedded/train/stdit3 --cfg-options model.type=STDiT4", "train-vae gone",
        "train opensora-v1-2/train/stage1 --data-path gone.csv",
        "extract opensora-v1-2/misc/extract --data-path gone.csv", "search-bs opensora-v1-2/misc/bs --data-path gone",
    ),
}  # fmt: skip


def test_nothing_heavy_is_imported_before_there_is_work(here: Path):
    code = (
        "import json, sys, opensora.cli as cli\n"
        "for status, commands in json.loads(sys.argv[1]).items():\n"
        "    for command in commands:\n"
        "        try:\n            found = cli.main(command.split())\n"
        "        except SystemExit as end:\n            found = end.code\n"
        "        heavy = sorted(set(sys.argv[2].split()) & set(sys.modules))\n"
        "        if found != int(status) or heavy:\n"
        "            sys.exit(f'{command}: status {found}, not {status}; imported {heavy}')\n"
        "print('ALL', 'LIGHT')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    words = [sys.executable, "-c", code, json.dumps(LIGHT), " ".join(HEAVY)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("ALL LIGHT\n"), done.stdout[-500:] + done.stderr[-500:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr and len(errors) == len(LIGHT[1]) + len(LIGHT[2])


@pytest.mark.parametrize("module", ["opensora", "opensora.cli"])
def test_the_package_runs_as_a_module(module: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    for argv, status in (("models", 0), ("inspect gone.mp4", 1), ("paint x", 2)):
        monkeypatch.setattr(sys, "argv", ["opensora", *argv.split()])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__")
        assert end.value.code == status


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--help"], ["generate", "replay", "inspect"]),
        (["generate", "--help"], ["PROMPT", "--model", "--num-frames", "--image-size", "--seed", "--preview"]),
        (["replay", "--help"], ["--save-dir", "--ckpt-path"]),
        (["inspect", "--help"], ["hub id"]),
        (["--version"], [__version__]),
    ],
)
def test_help(capsys, argv, words):
    with pytest.raises(SystemExit) as end:
        main(argv)
    printed = capsys.readouterr().out
    assert end.value.code == 0 and all(word in printed for word in words)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], 'the following arguments are required: VERB; type: opensora generate "a red circle moving right"; see'),
        (["genrate", "x"], "unknown verb 'genrate'; did you mean 'generate'? See opensora --help"),
        (["doctr"], "unknown verb 'doctr'"),
        (["replya", "x.mp4"], "unknown verb 'replya'; did you mean 'replay'?"),
        (["generate", "x", "--image-size", "64"], "--image-size: expected 2 arguments"),
        (["generate", "x", "--image-size", "64x64"], "--image-size: "),
        (["generate", "x", "--seed", "one"], "--seed: invalid int value: 'one'"),
        (["generate", "x", "--nope"], "unknown flag --nope"),
        (["generate", "x", "--seed", "1", "y"], "'y' is one word too many here; quote what belongs together"),
        (["generate", "x", "--flash-attn", "maybe"], "--flash-attn: "),
        (["replay"], "the following arguments are required: FILE; type: opensora replay samples/sample_0000.mp4; see"),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, argv, problem):
    with pytest.raises(SystemExit) as end:
        main(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and problem in error and "--help" in error


def test_generate_with_preview(here, hub_cache, capsys):
    assert main(["generate", "a cat", "a dog", "--model", SAMPLE, *SMALL, "--preview"]) == 0
    media = [f"samples/samples/sample_{index:04d}" for index in (0, 1)]
    assert capsys.readouterr().out.split() == [f"{path}{end}" for path in media for end in (".mp4", ".preview.png")]
    sheet = read_image(f"{media[0]}.preview.png")
    assert sheet.shape[0] > 3 * 16 and sheet.shape[1] > 4 * 24 and sheet.std() > 5


def test_prompts_by_place_come_before_those_by_flag(monkeypatch):
    seen = []
    monkeypatch.setattr("opensora.cli.verbs.generation.generate", lambda settings: seen.append(settings.prompt))
    main(["generate", "a cat", "a dog", "--model", SAMPLE, "--prompt", "a cow"])
    main(["generate", "--model", SAMPLE, "--cfg-options", "prompt=['of the file']"])
    assert seen == [["a cat", "a dog", "a cow"], ["of the file"]]


@pytest.mark.parametrize("size", [("--resolution", "144p", "--aspect-ratio", "1:1"), ("--image-size", "40", "48")])
def test_the_size_of_the_command_line_decides(here, hub_cache, capsys, size):
    (here / "config.py").write_text(f"_base_ = '{_absolute(SAMPLE)}'\nimage_size = (64, 64)\n")
    argv = ["--model", "config.py", "--num-frames", "1", "--num-sampling-steps", "1", "--save-dir", "out"]
    assert main(["generate", "x", *argv, *size]) == 0
    expected = (40, 48, 3) if size[0] == "--image-size" else (192, 192, 3)
    assert read_image(capsys.readouterr().out.strip()).shape == expected


def _absolute(config: str) -> Path:
    return Path(__file__).parents[1] / config


def test_inspect(hub_cache, capsys):
    expected = {"model": "STDiT3 (Open-Sora 1.2)", "vae": "video autoencoder", "text_encoder": "T5 text encoder"}
    for part, family in expected.items():
        folder = snapshot(hub_cache, part)
        assert main(["inspect", str(folder)]) == 0
        printed = capsys.readouterr().out
        assert f"{folder}: " in printed and " tensors, " in printed and "sha256 " in printed
        assert f"family: {family}" in printed
        assert main(["inspect", str(folder / "model.safetensors")]) == 0
        assert printed.split("sha256 ")[1].split()[0] in capsys.readouterr().out
    assert main(["inspect", "hpcai-tech/OpenSora-VAE-v1.2"]) == 0
    assert "family: video autoencoder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("gone.safetensors", None, "no such file or folder 'gone.safetensors'"),
        ("x.txt", b"text", "not a weight file"),
        ("x.safetensors", b"", "is empty: truncated, damaged or never copied"),
        ("x.pt", b"nonsense", "is a text file, not weights"),
        ("x.pt", b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.", "refused, it asks to run code"),
        ("folder/readme.txt", b"text", "no weights in this folder"),
    ],
)
def test_inspect_nonsense(here, capsys, name, content, problem):
    path = here / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert main(["inspect", name.partition("/")[0] if "/" in name else name]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and problem in error


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video, an image and a draft of the embedded model, in a folder."""
    folder = tmp_path_factory.mktemp("outputs")
    quick = ["--image-size", "16", "24", "--save-dir", str(folder), "--verbose", "0", "--num-sampling-steps", "2"]
    for name, more in (("video", ["--num-frames", "5"]), ("image", ["--num-frames", "1"]),
                       ("begun", ["--num-frames", "1", "--steps-until", "1"])):  # fmt: skip
        assert main(["generate", "a red circle", "--sample-name", name, *quick, *more]) == 0
    return folder


@pytest.mark.parametrize(
    "name", ["video_0000.mp4", "image_0000.png", "video_0000.json", "begun_0000.draft.safetensors"]
)
def test_inspect_prints_how_an_output_was_made(outputs: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    assert main(["inspect", str(outputs / name)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{outputs / name}: ")
    assert "prompt: a red circle" in lines and "settings:" in lines and "  image_size: [16, 24]" in lines
    assert ("of 2 steps are done; opensora continue" in lines[0]) == ("draft" in name)
    assert any(line.startswith("  model: ") and len(line.split()[-1]) == 64 for line in lines)  # of its weights


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt", "x" * 10**5), ("prompt", "a\nb\x1b[2J"), ("settings", {str(number): 1 for number in range(10**4)}),
        ("weights", {"x" * 10**5: "y"}), ("references", [[[1] * 1000] * 30]),
    ],
    ids=["long", "controls", "many", "key", "list"],
)  # fmt: skip
def test_the_report_of_a_recipe_is_bounded(
    outputs: Path, here: Path, capsys: pytest.CaptureFixture, key: str, value: object
) -> None:
    recipe = json.loads((outputs / "video_0000.json").read_text())
    (here / "x.json").write_text(json.dumps({**recipe, key: value}))
    status = main(["inspect", "x.json"])
    out, error = capsys.readouterr()
    assert status in (0, 1) and "\x1b" not in out + error
    lines = (out or error).splitlines()
    assert (len(lines) <= 202 if status == 0 else len(lines) == 1) and max(map(len, lines)) < 500


@pytest.mark.parametrize("name", ["x.mp4", "x.png", "x.json", "x.draft.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[]", b"nonsense" * 50, b'{"format": "x"}'], ids=range(4))
def test_what_holds_no_recipe(here: Path, capsys: pytest.CaptureFixture, name: str, content: bytes) -> None:
    (here / name).write_bytes(content)
    assert main(["inspect", name]) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("verb", "place"),
    [
        ("train", "opensora.training.diffusion.train"),
        ("train-vae", "opensora.training.autoencoder.train_vae"),
        ("extract", "opensora.training.feature_extraction.extract.extract"),
    ],
)
def test_verbs_have_the_programs_behind_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, verb: str, place: str
) -> None:
    def done(settings: TrainSettings) -> Path | TrainResult:
        folder = Path(settings.outputs)
        return folder if verb == "extract" else TrainResult(folder, step=1, model=folder)

    monkeypatch.setattr(place, done)
    assert main([verb, "embedded/train/stdit3", "--outputs", "there"]) == 0
    assert capsys.readouterr().out == "there\n"


def test_verbs_need_no_script() -> None:
    """The wheel has no scripts."""
    files = (Path(__file__).parents[1] / "opensora").rglob("*.py")
    assert not [file for file in files if re.search(r"^\s*(from|import) scripts\b", file.read_text(), re.MULTILINE)]


def test_threads_sleep_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user has said otherwise; OpenMP reads it when torch is imported."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert main(["models"]) == 0 and os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert main(["models"]) == 0 and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
