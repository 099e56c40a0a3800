"""An output describes itself, in the file and beside it, and both appear or neither."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest

from opensora.config.settings import InferenceSettings
from opensora.datasets import video as media
from opensora.errors import MediaError
from opensora.pipeline import output_files
from opensora.pipeline.output_files import write_video
from opensora.pipeline.output_folder import check_folder
from opensora.pipeline.outputs import Outputs
from opensora.pipeline.recipe import frames_digest, make_recipe, read_recipe

FRAMES = np.random.default_rng(0).integers(0, 256, (4, 15, 16, 3), np.uint8)


@pytest.fixture
def recipe():
    return make_recipe(
        prompt="a café in 東京",
        encoded_prompts=["a café in 東京. aesthetic score: 6.5.", "at night"],
        seed=42,
        sample_index=3,
        settings={"num_frames": 4, "fps": 12.6, "reference_path": None, "image_size": [15, 16]},
        weights={"model": "0" * 64, "vae": "1" * 64},
    )


def write_output(frames, base, fps, recipe):
    """The media path of a result with its JSON file, replacing an older one."""
    output = f"{base}{'.mp4' if len(frames) > 1 else '.png'}"
    settings = InferenceSettings(
        model={"type": "STDiT3"}, num_frames=len(frames), output=output, overwrite=True, save_fps=fps
    )
    return Outputs(settings, len(frames), makes_drafts=False).write(str(base), frames, recipe).path


@pytest.mark.parametrize("num_frames, suffix", [(4, ".mp4"), (1, ".png")])
def test_round_trip(num_frames, suffix, recipe, tmp_path):
    frames = FRAMES[:num_frames]
    path = write_output(frames, tmp_path / "sample.v1_0000", 12.6, recipe)
    assert path == tmp_path / f"sample.v1_0000{suffix}"
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, "sample.v1_0000.json"}
    sidecar = json.loads((tmp_path / "sample.v1_0000.json").read_text(encoding="utf-8"))
    assert read_recipe(path) == read_recipe(tmp_path / "sample.v1_0000.json") == sidecar
    assert sidecar["output"] == {
        "sha256": hashlib.sha256(frames.tobytes()).hexdigest(),
        "num_frames": num_frames,
        "height": 15,
        "width": 16,
        "fps": 12.6,
    }
    assert {name: sidecar[name] for name in recipe} == recipe
    assert {"opensora", "torch", "platform"} <= set(sidecar["program"])


def test_digest_of_an_image_is_that_of_its_pixels(recipe, tmp_path):
    path = write_output(FRAMES[:1], tmp_path / "a", 24, recipe)
    assert frames_digest(media.read_image(path)[None]) == read_recipe(path)["output"]["sha256"]
    assert frames_digest(FRAMES[:, ::-1]) == frames_digest(FRAMES[:, ::-1].copy()) != frames_digest(FRAMES)


def test_stripped_metadata_falls_back_to_the_sidecar(recipe, tmp_path):
    path = write_output(FRAMES, tmp_path / "a.b", 8, recipe)
    full = read_recipe(path)
    media.write_video(FRAMES, path, 8)
    assert read_recipe(path) == full
    (tmp_path / "a.b.json").unlink()
    with pytest.raises(MediaError, match="no recipe"):
        read_recipe(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 999}', None])
def test_broken_recipes(text, tmp_path):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(MediaError):
        read_recipe(tmp_path / "a.json")
    with pytest.raises(MediaError):
        read_recipe(tmp_path / "missing.mp4")


def test_check_folder(tmp_path):
    assert check_folder(tmp_path / "a/b") == tmp_path / "a/b"
    assert list((tmp_path / "a/b").iterdir()) == []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below", "/proc/self/outputs", "/dev/null/x"):
        with pytest.raises(MediaError, match="--save-dir") as caught:
            check_folder(folder)
        assert "\n" not in str(caught.value)


def test_unwritable_folder(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    for frames in (FRAMES, FRAMES[:1]):
        with pytest.raises(MediaError, match="cannot be written"):
            write_output(frames, tmp_path / "file/a", 8, recipe)


FAILURES = [(OSError(28, "No space left on device"), MediaError), (KeyboardInterrupt(), KeyboardInterrupt)]


@pytest.mark.parametrize("failure, expected", FAILURES)
@pytest.mark.parametrize("step", ["encode_video", "encode_image", "write_text", "replace"])
@pytest.mark.parametrize("existing", [False, True])
def test_failure_leaves_both_or_neither(failure, expected, step, existing, recipe, tmp_path, monkeypatch):
    frames = FRAMES[:1] if step == "encode_image" else FRAMES
    if existing:
        write_output(frames, tmp_path / "a", 8, recipe)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise failure

    owner = {"write_text": output_files.Path, "replace": os}.get(step, output_files)
    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(expected) as caught:
        write_output(frames, tmp_path / "a", 8, recipe)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
    if expected is MediaError:
        assert "No space left on device" in str(caught.value) and str(tmp_path / "a.") in str(caught.value)


@pytest.mark.parametrize("num_frames, suffix", [(4, ".mp4"), (1, ".png")])
def test_write_video_has_the_bytes_of_an_output(num_frames, suffix, recipe, tmp_path):
    frames = FRAMES[:num_frames]
    expected = write_output(frames, tmp_path / "expected", 12.6, recipe)
    path = tmp_path / "folder" / f"a{suffix}"
    for _ in range(2):  # the second replaces the first
        assert write_video(path, frames, 12.6, recipe) == path
        assert path.read_bytes() == expected.read_bytes()
    assert path.with_suffix(".json").read_bytes() == expected.with_suffix(".json").read_bytes()
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, "a.json"}


def test_write_video_as_gif(recipe, tmp_path):
    path = write_video(tmp_path / "a.gif", FRAMES, 8, recipe)
    assert media.read_video(path)[0].shape == FRAMES.shape and media.read_video(path)[1] == pytest.approx(8, rel=0.1)
    assert read_recipe(tmp_path / "a.json")["output"]["sha256"] == frames_digest(FRAMES)


@pytest.mark.parametrize("num_frames, name, remedy", [(4, "a.png", "a.mp4"), (1, "a.mp4", "a.png"), (4, "a", "a.mp4")])
def test_write_video_to_a_name_of_the_wrong_kind(num_frames, name, remedy, recipe, tmp_path):
    with pytest.raises(MediaError, match=f"name it {remedy}"):
        write_video(tmp_path / name, FRAMES[:num_frames], 8, recipe)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure, expected", FAILURES)
@pytest.mark.parametrize("step", ["encode_video", "replace"])
def test_write_video_writes_all_or_nothing(failure, expected, step, recipe, tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", FRAMES, 8, recipe)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(os if step == "replace" else output_files, step, fail)
    with pytest.raises(expected):
        write_video(path, FRAMES[:, ::-1], 8, recipe)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
