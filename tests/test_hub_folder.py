"""Hub folders: written by `export --to hub`, read back to the same frames; nothing in them names files or servers."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import opensora
from opensora.checkpoints.hub import locate
from opensora.checkpoints.read import read_state_dict
from opensora.cli import main
from opensora.config.hub_folder import FOLDERS, INDEX, SETTINGS, SOURCES, read_hub_folder
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError
from opensora.pipeline.recipe import RECIPE_SETTINGS
from tests.checkpoints import tree

PROMPT = "a red circle moving right on a black background"
SMALL = ["--num-frames", "5", "--image-size", "32", "32", "--num-sampling-steps", "2", "--seed", "7", "--device", "cpu"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of the embedded model."""
    file = tmp_path_factory.mktemp("sample") / "red circle.mp4"
    assert main(["generate", PROMPT, *SMALL, "--verbose", "0", "--output", str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def folder(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "shapes-v1"
    training = folder.parent / "train.py"
    training.write_text("epochs = 3\nlr = 1e-4\n")
    argv = ["export", "embedded", str(folder), "--to", "hub", "--license", "apache-2.0", "--base-model", "org/base"]
    assert main([*argv, "--training", str(training), "--samples", str(sample)]) == 0
    return folder


def test_layout(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        INDEX, "README.md", "transformer", "vae", "text_encoder", "tokenizer", "scheduler", "samples",
    }  # fmt: skip
    index = json.loads((folder / INDEX).read_text())
    assert index["transformer"] == ["opensora", "STDiT3"] and index["scheduler"] == ["opensora", "rflow"]
    for part, source in {"transformer": "stdit3", "vae": "vae", "text_encoder": "text_encoder"}.items():
        wanted, found = read_state_dict(locate(f"embedded:{source}")), read_state_dict(folder / part)
        assert found.keys() == wanted.keys()
        assert all(
            torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in wanted.items()
        )
    assert str(folder.parent) not in (folder / INDEX).read_text() + (folder / "README.md").read_text()


def test_the_same_frames(folder: Path) -> None:
    request = dict(num_frames=5, height=32, width=32, num_inference_steps=2, seed=7)
    expected = opensora.load("embedded", device="cpu")(PROMPT, **request)
    for name in (folder, folder / INDEX):
        assert (opensora.load(str(name), device="cpu")(PROMPT, **request).frames == expected.frames).all()


def test_the_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the card, from the folder above."""
    monkeypatch.chdir(folder.parent)
    [command] = re.findall(r"^opensora (generate .*--seed.*)$", (folder / "README.md").read_text(), re.M)
    words = [*shlex.split(command), "--device", "cpu", "--verbose", "0", "--output", str(tmp_path / "a.mp4")]
    assert main(words) == 0
    from opensora.datasets.video import read_video

    found, shown = (read_video(path)[0] for path in (tmp_path / "a.mp4", folder / "samples" / "red circle.mp4"))
    assert (found == shown).all()
    assert main(["plan", PROMPT, "--model", folder.name, "--device", "cpu"]) == 0
    assert main(["replay", str(tmp_path / "a.mp4"), "--save-dir", str(tmp_path / "again")]) == 0


def test_the_card(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "opensora", "pipeline_tag": "text-to-video", "license": "apache-2.0", "base_model": "org/base",
    }  # fmt: skip
    assert "lr = 1e-4" in text and "hf upload ORG/shapes-v1 shapes-v1" in text and "13,416,768" in text


def test_a_model_of_a_run_with_the_parts_of_a_configuration(tmp_path: Path) -> None:
    argv = ["export", str(locate("embedded:stdit3")), str(tmp_path / "a"), "--to", "hub", "--config", "embedded"]
    assert main([*argv, "--dtype", "fp32"]) == 0
    held = read_state_dict(tmp_path / "a" / "transformer")
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    assert "Not stated." in (tmp_path / "a" / "README.md").read_text()


def test_settings_that_a_folder_may_state() -> None:
    """They are settings of a request, and none of those that only a user may choose."""
    assert RECIPE_SETTINGS & {*InferenceSettings.__dataclass_fields__} > SETTINGS
    assert {"from_pretrained", "cache_dir"} < SOURCES


Change = Callable[[dict[str, Any]], object]
HOSTILE: dict[str, tuple[Change, str]] = {
    "an output folder": (lambda one: one["settings"].update(save_dir="/etc"), "may not set 'save_dir'"),
    "a server": (lambda one: one["settings"].update(llm_base_url="http://a"), "may not set 'llm_base_url'"),
    "a reference": (lambda one: one["settings"].update(reference_path="/etc/passwd"), "'reference_path'"),
    "other weights": (lambda one: one["model"].update(from_pretrained="org/x"), "may not set 'from_pretrained'"),
    "weights inside": (
        lambda one: one["vae"].update(vae_2d={"a": [{"from_pretrained": "x"}]}), "may not set 'from_pretrained'",
    ),
    "a cache": (lambda one: one["text_encoder"].update(cache_dir="/tmp"), "may not set 'cache_dir'"),
    "a subfolder": (lambda one: one["model"].update(subfolder="../.."), "may not set 'subfolder'"),
    "no model": (lambda one: one.pop("model"), "model"),
    "another section": (lambda one: one.update(extra={}), "extra"),
    "a list": (lambda one: one.update(model=[]), "model"),
    "nothing": (lambda one: one.clear(), "model"),
    "unknown type": (lambda one: one["model"].update(type="os.system"), "os.system"),
    "unknown keyword": (lambda one: one["model"].update(command="ls"), "command"),
}  # fmt: skip


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The files of the index alone, beside empty folders."""
    for name in (*FOLDERS.values(), "scheduler"):
        (tmp_path / "hub" / name).mkdir(parents=True)
    for name in (INDEX, "scheduler/scheduler_config.json"):
        (tmp_path / "hub" / name).write_bytes((folder / name).read_bytes())
    return tmp_path / "hub"


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_folders(kind: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = HOSTILE[kind]
    index = json.loads((copied / INDEX).read_text())
    change(index["opensora"])
    (copied / INDEX).write_text(json.dumps(index))
    argv = ["generate", PROMPT, *SMALL, "--model", str(copied), "--output", str(tmp_path / "a.mp4")]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "a.mp4").exists()


def test_folders_of_other_programs(copied: Path) -> None:
    for content in ('{"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"]}', "[]", "{}"):
        (copied / INDEX).write_text(content)
        with pytest.raises(ConfigError, match="is no index of this program"):
            read_hub_folder(copied)


def test_incomplete_folders(copied: Path) -> None:
    (copied / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "rflow", "from_pretrained": "x"}')
    with pytest.raises(ConfigError, match="may not set 'from_pretrained'"):
        read_hub_folder(copied)
    (copied / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ConfigError, match=r"scheduler_config\.json: cannot be read"):
        read_hub_folder(copied)
    (copied / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "rflow", "type": "rflow"}')
    (copied / "vae").rmdir()
    with pytest.raises(ConfigError, match="lacks the folder vae; copy it again"):
        read_hub_folder(copied)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--license", "my own\nlicense: x"], "the license is"),
        (["--base-model", "a b"], "the base model is"),
        (["--training", "gone.py"], "gone.py: cannot be read as a configuration"),
        (["--samples", "gone.mp4"], "gone.mp4"),
    ],
)
def test_whole_or_not_at_all(more: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(tmp_path)
    assert main(["export", "embedded", str(tmp_path / "a"), "--to", "hub", *more]) == 1
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1 and tree(tmp_path) == before
