"""Adapters in requests: by flag and by name, several, swapped, fused, in recipes and drafts, found again by replay."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import opensora
from opensora import cli
from opensora.checkpoints.lora import FILE, read_layers, write_lora
from opensora.errors import ConfigError, WeightsError
from opensora.models.lora import LoRAConfig, LoRAWeights, adapters_of
from opensora.pipeline.adapter_uses import AdapterUse, adapter_uses
from opensora.pipeline.pipeline import VideoPipeline
from opensora.pipeline.recipe import read_recipe
from opensora.pipeline.replay import finish, replay
from tests.full import some
from tests.test_lora import weights_for

PROMPT = "a red circle moving right"
SMALL: dict[str, Any] = dict(device="cpu", num_frames=1, image_size=(32, 32), num_inference_steps=2)
FLAGS = ["--device", "cpu", "--num-frames", "1", "--image-size", "32", "32", "--steps", "3", "--seed", "3"]


@pytest.fixture(scope="module")
def pipe() -> Iterator[VideoPipeline]:
    yield opensora.load("embedded", **SMALL)


@pytest.fixture(scope="module")
def files(pipe: VideoPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of the embedded model, and one of other weights."""
    folder = tmp_path_factory.mktemp("adapters")
    pipe(PROMPT)
    base = pipe.models.summaries["model"].sha256
    for number, name in enumerate(("one", "two")):
        weights = weights_for(pipe.models.model, LoRAConfig(rank=2, targets=["mlp.fc1", "attn.qkv"]), seed=number)
        write_lora(folder / f"{name}.safetensors", LoRAWeights(weights.layers, base))
    write_lora(folder / "foreign.safetensors", LoRAWeights(weights.layers, "0" * 64))
    return folder


@pytest.fixture(autouse=True)
def no_adapters(pipe: VideoPipeline) -> Iterator[None]:
    yield
    pipe.unload()
    pipe.unfuse()


def frames(pipe: VideoPipeline, **given: Any) -> np.ndarray:
    return pipe(PROMPT, seed=3, **given).frames


def far(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


def test_adapters_by_name(pipe: VideoPipeline, files: Path) -> None:
    """Both together, each alone, at other strengths, none: without loading the base again."""
    before, model = frames(pipe), pipe.models.model
    assert pipe.load_lora(files / "one.safetensors") == "one"
    one = frames(pipe)
    pipe.load_lora_weights(files / "two.safetensors", adapter_name="second")
    both = frames(pipe)
    pipe.set_adapters("second")
    two = frames(pipe)
    assert min(far(one, before), far(two, before), far(both, one), far(both, two)) > 0.15
    pipe.set_adapters(["second", "one"], [1.0, 1.0])
    assert far(frames(pipe), both) < 0.05  # sums in another order
    pipe.set_adapters(["one", "second"], [1.0, 0.0])
    assert np.array_equal(frames(pipe), one)
    pipe.set_adapters(["one", "second"], 0.0)
    assert np.array_equal(frames(pipe), before)  # bit for bit
    pipe.set_adapters("one")
    pipe.fuse()
    assert far(frames(pipe), one) < 0.1
    pipe.unfuse_lora()
    assert np.array_equal(frames(pipe), one)
    pipe.unload("one")
    assert np.array_equal(frames(pipe), before) and adapters_of(pipe.models.model) == []
    assert pipe.models.model is model


def test_an_adapter_of_one_call(pipe: VideoPipeline, files: Path) -> None:
    before = frames(pipe)
    with_one = frames(pipe, lora=[f"{files / 'one.safetensors'}:0.5"])
    assert far(with_one, before) > 0.5 and np.array_equal(frames(pipe), before)
    pipe.load_lora(files / "one.safetensors", "style", strength=0.5)
    assert np.array_equal(frames(pipe), with_one)
    assert pipe.active_adapters() == [("style", 0.5)]


def test_a_replaced_file_is_read_again(pipe: VideoPipeline, files: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    shutil.copyfile(files / "one.safetensors", file)
    first = frames(pipe, lora=[str(file)])
    shutil.copyfile(files / "two.safetensors", tmp_path / "new")
    (tmp_path / "new").replace(file)
    assert far(frames(pipe, lora=[str(file)]), first) > 0.5


@pytest.mark.parametrize("changes", [{"memory": "low"}, {"linear": "int8"}, {"memory": "balanced", "batch_size": 2}])
@some(2)
def test_every_kind_of_pipeline_sees_adapters(files: Path, changes: dict[str, Any]) -> None:
    other = opensora.load("embedded", **SMALL, **changes)
    before = frames(other)
    other.load_lora(files / "one.safetensors")
    with_one = frames(other)
    assert far(with_one, before) > 0.5
    other.set_adapters("one", 0)
    assert np.array_equal(frames(other), before)


def test_recipes_name_adapters_and_replay_finds_them(files: Path, tmp_path: Path, capsys: Any) -> None:
    one, two = (shutil.copy(files / f"{name}.safetensors", tmp_path) for name in ("one", "two"))
    flags = [*FLAGS, "--save-dir", str(tmp_path / "out"), "--lora", f"{one}:0.5", two]
    assert cli.main(["generate", PROMPT, *flags]) == 0
    image = Path(capsys.readouterr().out.split()[0])
    recipe = read_recipe(image)
    assert recipe["settings"]["lora"] == [f"{one}:0.5", two]
    assert {"lora 1", "lora 2"} < recipe["weights"].keys()
    assert replay(image, tmp_path / "again").identical
    moved = Path(one).rename(tmp_path / "moved.safetensors")
    with pytest.raises(WeightsError, match="no such adapter"):
        replay(image, tmp_path / "lost")
    assert cli.main(["replay", str(image), "--save-dir", str(tmp_path / "found"), "--lora", str(moved), two]) == 0
    swapped = replay(image, tmp_path / "swapped", lora=[two, str(moved)])
    assert not swapped.identical and swapped.differences[:2] == ["other lora 1 weights", "other lora 2 weights"]
    with pytest.raises(ConfigError, match="has 2 adapters, but lora names 1"):
        replay(image, tmp_path / "few", lora=[two])


def test_drafts_go_on_with_their_adapters(files: Path, tmp_path: Path, capsys: Any) -> None:
    one = shutil.copy(files / "one.safetensors", tmp_path)
    flags = [*FLAGS, "--save-dir", str(tmp_path), "--lora", f"{one}:0.7"]
    assert cli.main(["generate", PROMPT, *flags, "--sample-name", "whole"]) == 0
    assert cli.main(["generate", PROMPT, *flags, "--sample-name", "part", "--steps-until", "2"]) == 0
    [draft] = tmp_path.glob("*.draft.safetensors")
    moved = Path(one).rename(tmp_path / "moved.safetensors")

    def use(path: str) -> Any:
        return lambda settings: {**settings, "lora": [path]}

    with pytest.raises(WeightsError, match="other lora 1 weights"):
        list(finish([draft], use(str(files / "two.safetensors"))))
    with pytest.raises(ConfigError, match="has 1 adapters, but lora names 0"):
        list(finish([draft], lambda settings: {**settings, "lora": None}))
    with pytest.raises(ConfigError, match=r"was 0\.7 and is 0\.5 now"):
        list(finish([draft], use(f"{moved}:0.5")))
    [result] = finish([draft], use(str(moved)))
    [whole] = tmp_path.glob("whole*.json")
    assert read_recipe(result.path)["output"]["sha256"] == read_recipe(whole)["output"]["sha256"]


def test_what_is_no_adapter_is_refused(pipe: VideoPipeline, files: Path, tmp_path: Path, capsys: Any) -> None:
    """Another base and what is no file; on the command line before torch is needed."""
    foreign = files / "foreign.safetensors"
    with pytest.raises(WeightsError, match=r"was trained on other weights .* --any-base"):
        pipe.load_lora(foreign)
    assert pipe.adapters == {}
    assert frames(pipe, lora=[str(foreign)], any_base=True).size
    for wrong in ("absent", str(tmp_path), "/dev/zero"):
        with pytest.raises(WeightsError, match=r"adapter|regular"):
            frames(pipe, lora=[wrong])
    for wrong in ("one.safetensors:1e9", "one.safetensors:nan"):
        with pytest.raises(ConfigError, match="strength"):
            frames(pipe, lora=[wrong])
    with pytest.raises(ConfigError, match="at most 32"):
        frames(pipe, lora=["a"] * 33)
    pipe.load_lora(files / "one.safetensors", "style")
    for call, message in (
        (lambda: pipe.load_lora(files / "two.safetensors", "style"), "already"),
        (lambda: pipe.set_adapters("stile"), "did you mean 'style'"),
        (lambda: pipe.set_adapters(["style"], [1.0, 2.0]), "1 adapters have 2 strengths"),
        (lambda: pipe.unload("other"), "no adapter"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    assert cli.main(["generate", PROMPT, "--lora", "absent.safetensors"]) == 1
    assert "absent.safetensors: no such adapter" in capsys.readouterr().err


def test_the_setting_is_read_from_its_end() -> None:
    found = adapter_uses(["a", "a:0.5", "C:\\a", "s:x:2", "a:-1"])
    assert found == [("a", 1.0), ("a", 0.5), ("C:\\a", 1.0), ("s:x", 2.0), ("a", -1.0)]
    assert adapter_uses([str(AdapterUse("b:3", 1.0))]) == [("b:3", 1.0)]


def test_a_file_of_a_run_is_a_folder_too(files: Path, tmp_path: Path) -> None:
    weights = read_layers(files / "one.safetensors")
    write_lora(tmp_path / "ema" / "pytorch_lora_weights.safetensors", weights)
    again = read_layers(tmp_path / "ema")
    assert again.base == weights.base
    assert all(torch.equal(again.layers[name].A, one.A) for name, one in weights.layers.items())


def test_the_program_of_the_document_runs(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = Path(__file__).parents[1] / "docs/lora.md"
    [text] = re.findall(r"^```python\n(.*?)^```$", document.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    write_lora(tmp_path / "my-lora/diagonal" / FILE, read_layers(files / "one.safetensors"))
    monkeypatch.chdir(tmp_path)
    smaller = 'device="cpu", num_frames=1, image_size=(32, 32), num_inference_steps=2)'
    exec(text.replace('device="cpu")', smaller), {})
