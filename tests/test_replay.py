"""`opensora replay`: an output made again from its own recipe, and what is said when it cannot be the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import opensora
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.save import save_file
from opensora.cli import main
from opensora.datasets.video import read_image, read_video, write_image, write_video
from opensora.pipeline import generation
from opensora.pipeline.frame_difference import compare_frames
from opensora.pipeline.recipe import read_recipe
from opensora.pipeline.replay import _explanations
from tests.checkpoints import SAMPLE, run_script, snapshot, tree, use_cache
from tests.full import some

SMALL = ("--num-sampling-steps", "2", "--image-size", "16", "24", "--num-frames", "5")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def original(filled_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `weights`, and `made/sample_0000.mp4` made with it."""
    folder = tmp_path_factory.mktemp("original")
    shutil.copytree(snapshot(filled_cache, "model"), folder / "weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        use_cache(filled_cache, patch)
        argv = ("--prompt", "a cat", "--ckpt-path", "weights", "--save-dir", "made")
        assert run_script(SAMPLE, *SMALL, *argv) == 0
    return folder


@pytest.fixture
def own_weights(here: Path, original: Path) -> Path:
    """The model in a copy of that folder, which a test may change."""
    shutil.copytree(original, here, dirs_exist_ok=True)
    return here / "weights"


def frames(path: Path) -> bytes:
    return (read_image(path) if path.suffix == ".png" else read_video(path)[0]).tobytes()


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (("--seed", "1", "--image-size", "16", "24", "--prompt", "a", "b", "--batch-size", "2"), "sample_0001.mp4"),
        (("--seed", "2", "--image-size", "37", "53", "--prompt", "a", "--num-sample", "3"), "sample_0000-2.mp4"),
        (("--seed", "3", "--image-size", "64", "64", "--num-frames", "1", "--prompt", 'A "Cat" 猫'), "sample_0000.png"),
        (("--prompt-path", "p.txt", "--start-index", "2", "--batch-size", "4", "--aes", "4"), "sample_0003.mp4"),
        (("--prompt", "a dog: 'woof'", "--prompt-as-path", "--save-fps", "8", "--dtype", "fp32"), "a dog: 'woof'.mp4"),
    ],
)
@some(3)
def test_replay_is_identical(here, capsys, argv, name):
    (here / "p.txt").write_text("one\ntwo\nthree\nfour\n")
    assert run_script(SAMPLE, *SMALL, *argv, "--save-dir", "made") == 0
    original = here / "made" / name
    sidecar = original.with_suffix(".json")
    for source, absent in ((original, sidecar), (sidecar, original)):
        shutil.copytree(here / "made", here / f"only{source.suffix}")
        (here / f"only{source.suffix}" / absent.name).unlink()
        capsys.readouterr()
        assert main(["replay", f"only{source.suffix}/{source.name}", "--save-dir", f"again{source.suffix}"]) == 0
        path, verdict = capsys.readouterr().out.splitlines()
        assert verdict == "identical: every decoded frame has the same bytes"
        assert path.endswith(original.suffix) and Path(path).parent.name == f"again{source.suffix}"
        assert frames(Path(path)) == frames(original)
        assert read_recipe(path)["prompt"] == read_recipe(original)["prompt"]


def test_a_changed_weight_is_reported(here, own_weights, capsys):
    tensors = read_state_dict(own_weights)
    save_file({**tensors, "final_layer.linear.bias": tensors["final_layer.linear.bias"] + 1}, own_weights / "model.pt")
    (own_weights / "model.safetensors").unlink()
    capsys.readouterr()
    assert main(["replay", "made/sample_0000.mp4", "--save-dir", "again"]) == 1
    assert capsys.readouterr().out.splitlines()[1] == "different: other model weights"


def test_a_changed_reference_is_refused(here, capsys):
    write_image(np.full((16, 24, 3), 9, np.uint8), here / "a.png")
    argv = ("--prompt", "a cat", "--reference-path", "a.png", "--mask-strategy", "0", "--save-dir", "made")
    assert run_script(SAMPLE, *SMALL, *argv) == 0
    digest = hashlib.sha256((here / "a.png").read_bytes()).hexdigest()
    assert read_recipe("made/sample_0000.mp4")["references"] == {"a.png": digest}
    assert main(["replay", "made/sample_0000.mp4", "--save-dir", "again"]) == 0
    write_image(np.full((16, 24, 3), 8, np.uint8), here / "a.png")
    before = tree(here)
    capsys.readouterr()
    assert main(["replay", "made/sample_0000.mp4", "--save-dir", "other"]) == 1
    error, found = capsys.readouterr().err, hashlib.sha256((here / "a.png").read_bytes()).hexdigest()
    assert f"reference 'a.png' is not what it was, sha256 {digest[:12]} then; restore" in error
    assert found[:6] not in error
    assert tree(here) == before


def test_another_version_is_reported(here, own_weights, capsys):
    sidecar = here / "made/sample_0000.json"
    recipe = json.loads(sidecar.read_text())
    recipe["program"]["torch"], recipe["output"]["sha256"] = "1.0", "0" * 64
    sidecar.write_text(json.dumps(recipe))
    capsys.readouterr()
    assert main(["replay", str(sidecar), "--save-dir", "again"]) == 1
    _, why, distance = capsys.readouterr().out.splitlines()
    assert why.startswith("different: torch 1.0 then, ")
    made_by = f"made by opensora {opensora.__version__}; difference of the frames: "
    assert distance == made_by + "none"
    (here / "made/sample_0000.mp4").unlink()
    assert main(["replay", str(sidecar), "--save-dir", "without"]) == 1
    assert capsys.readouterr().out.splitlines()[2] == made_by + "unknown, because the original cannot be read"


def test_frames_are_compared(here):
    """Videos and images; files that are damaged, of other sizes or lengths are not."""
    one, two = np.zeros((3, 16, 24, 3), np.uint8), np.zeros((2, 16, 24, 3), np.uint8)
    write_image(one[0], here / "a.png"), write_video(one, here / "a.mp4", 8)
    one[0, :2, :2] = 5
    write_image(one[0], here / "b.png"), write_video(two, here / "short.mp4", 8)
    (here / "damaged.mp4").write_bytes(b"no video")
    found = compare_frames(here / "a.png", here / "b.png", 1)
    assert found == (5, 12 / 1152, pytest.approx(10 * np.log10(255**2 * 1152 / (12 * 25))))
    assert str(found) == "at most 5 of 255 levels, in 1.04% of the values; PSNR 54.0 dB: " + (
        "no more than rounding and compression cause"
    )
    assert str(found._replace(psnr=30.0)).endswith("PSNR 30.0 dB")
    assert compare_frames(here / "a.mp4", here / "a.mp4", 3) == (0, 0.0, float("inf"))
    for other in ("short.mp4", "damaged.mp4", "missing.mp4", "a.png"):
        assert compare_frames(here / "a.mp4", here / other, 3) is None


def test_moved_weights(here, own_weights, capsys):
    own_weights.rename(here / "elsewhere")
    before = tree(here)
    capsys.readouterr()
    assert main(["replay", "made/sample_0000.mp4", "--save-dir", "again"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no such file or folder 'weights'" in error and "--ckpt-path" in error
    assert tree(here) == before
    assert main(["replay", "made/sample_0000.mp4", "--save-dir", "again", "--ckpt-path", "elsewhere"]) == 0


def test_the_original_is_never_overwritten(here, own_weights, capsys):
    before = tree(here)
    assert main(["replay", "made/sample_0000.mp4", "--save-dir", "./made/"]) == 1
    assert "is where the original is; choose another --save-dir" in capsys.readouterr().err
    assert tree(here) == before


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", [1, 3])
@some(1)
def test_the_number_of_threads_is_recorded_and_used_again(here, capsys, monkeypatch, threads, number):
    used, clip = [], generation.denoise_clip
    monkeypatch.setattr(generation, "denoise_clip", lambda *given: used.append(torch.get_num_threads()) or clip(*given))
    argv = (SAMPLE, *SMALL, "--num-frames", "1", "--prompt", "a cat", "--save-dir")
    torch.set_num_threads(number)
    assert run_script(*argv, "made") == 0 and run_script(*argv, "drafts", "--steps-until", "1") == 0
    torch.set_num_threads(4 - number)
    assert main(["replay", "made/sample_0000.png", "--save-dir", "again"]) == 0
    assert main(["continue", "drafts/sample_0000.draft.safetensors"]) == 0
    assert used == [number] * 4 and torch.get_num_threads() == 4 - number
    for path in ("made/sample_0000.png", "again/sample_0000-replay_0000.png", "drafts/sample_0000.png"):
        assert read_recipe(path)["threads"] == number
        assert frames(Path(path)) == frames(here / "made/sample_0000.png")


def test_what_may_explain_other_frames():
    """Older recipes know neither the tokenizer nor the number of threads."""
    program = {"opensora": "1", "torch": "2"}
    then = {"program": program, "weights": {"model": "a", "tokenizer": "b"}, "threads": 1}
    now = {"program": {**program, "torch": "3"}, "weights": {"model": "a", "tokenizer": "c"}, "threads": 2}
    assert _explanations(then, now) == ["another tokenizer", "torch 2 then, 3 now", "threads 1 then, 2 now"]
    assert _explanations(then, then) == []
    old = {"program": program, "weights": {"model": "x"}}
    assert _explanations(old, now) == ["other model weights", "torch 2 then, 3 now", "threads not recorded then, 2 now"]


def damaged(recipe: dict, *path: str, value: object = None) -> dict:
    copy = json.loads(json.dumps(recipe))
    place = copy
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("settings",), None, "its recipe is incomplete or damaged: setting 'settings' is missing"),
        (("settings",), [1], "incomplete or damaged: settings must be a dict; it is [1]"),
        (("settings", "model"), None, "setting 'model' is missing"),
        (("settings", "num_frame"), 3, "unknown setting 'num_frame'; did you mean 'num_frames'?"),
        (("settings", "num_frames"), -4, "num_frames must be at least 1"),
        (("settings", "image_size"), [3, 3], "too small"),
        (("settings", "save_dir"), 3, "save_dir must be"),
        (("prompt",), None, "incomplete or damaged: setting 'prompt' is missing"),
        (("prompt",), 5, "incomplete or damaged: prompt must be a string; it is 5"),
        (("prompt",), " ", "a prompt is empty"),
        (("sample_index",), None, "incomplete or damaged"),
        (("sample_index",), 9, "sample 9"),
        (("output",), None, "incomplete or damaged"),
        (("weights",), 3, "incomplete or damaged"),
        (("program",), None, "incomplete or damaged"),
        (("format",), 99, "a newer program wrote this recipe"),
        (("format",), None, "is not the recipe of an output"),
    ],
)
def test_damaged_recipes(here, own_weights, capsys, monkeypatch, path, value, problem):
    for loader in ("load_text_encoder_weights", "load_model_weights"):
        monkeypatch.setattr(f"opensora.checkpoints.builder.{loader}", None)
    sidecar = here / "made/sample_0000.json"
    sidecar.write_text(json.dumps(damaged(json.loads(sidecar.read_text()), *path, value=value)))
    before = tree(here)
    capsys.readouterr()
    assert main(["replay", str(sidecar), "--save-dir", "again"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and problem in error
    assert tree(here) == before


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b"\x00" * 5000])
@pytest.mark.parametrize("name", ["x.json", "x.mp4", "x.png", "x"])
def test_nonsense_is_no_recipe(here, capsys, content, name):
    if content is not None:
        (here / name).write_bytes(content)
    before = tree(here)
    assert main(["replay", name]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name}: ") and error.count("\n") == 1
    assert tree(here) == before


def test_a_video_of_another_program(here, own_weights, capsys):
    write_video(read_video(here / "made/sample_0000.mp4")[0], here / "other.mp4", 24)
    assert main(["replay", "other.mp4"]) == 1
    assert "holds no recipe" in capsys.readouterr().err
