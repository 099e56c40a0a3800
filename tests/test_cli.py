"""The command `opensora`: its verbs, what they print, and what they cost before any work is done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opensora import __version__
from opensora.cli import main
from opensora.datasets.video import read_image
from tests.checkpoints import SAMPLE, snapshot

SMALL = ("--num-sampling-steps", "2", "--image-size", "16", "24", "--num-frames", "17")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_nothing_heavy_is_imported_before_there_is_work():
    code = (
        "import sys, opensora.cli as cli\n"
        "for argv in (['--help'], ['generate', '--help'], ['--version'], ['generate', 'x', '--seed', 'y'], []):\n"
        "    try:\n        cli.main(argv)\n    except SystemExit:\n        pass\n"
        "assert cli.main(['generate', 'x', '--model', 'embeded']) == 1\n"
        "heavy = {'torch', 'numpy', 'transformers', 'diffusers', 'av', 'PIL', 'huggingface_hub', 'bs4', 'ftfy'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("HEAVY []\n"), done.stdout + done.stderr


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
    monkeypatch.setattr("opensora.cli.generate", lambda settings: seen.append(settings.prompt))
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
        ("x.safetensors", b"", "truncated, damaged or no safetensors file"),
        ("x.pt", b"nonsense", "truncated, damaged or no PyTorch checkpoint"),
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
