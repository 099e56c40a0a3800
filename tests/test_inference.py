"""scripts/inference.py and `opensora generate` from the command line to playable files, on tiny checkpoints."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import opensora
from opensora import pipeline
from opensora.cli import main
from opensora.datasets.video import read_image, read_video
from opensora.recipe import frames_digest, read_recipe
from opensora.weights import read_state_dict, save_file, save_pretrained, summarize
from opensora.weights.tokenizer import tokenizer_hash
from tests.checkpoints import SAMPLE, SCRIPT, run_script, snapshot
from tests.tiny import make_tiny_stdit3

SHIPPED = Path(opensora.__file__).parent / "embedded"
needs_shipped = pytest.mark.skipif(
    not all((SHIPPED / part / "model.safetensors").is_file() for part in ("stdit3", "vae", "text_encoder")),
    reason="the embedded model has not been trained",
)
SMALL = ("--num-sampling-steps", "2", "--image-size", "16", "24", "--num-frames", "17")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def digests(folder: Path) -> dict[str, str]:
    """File name without suffix -> digest of the frames that the file holds now, checked against its recipe's size."""
    found = {}
    for path in folder.glob("*.mp4"):
        frames, _ = read_video(path)
        output = read_recipe(path)["output"]
        assert frames.shape == (output["num_frames"], output["height"], output["width"], 3)
        found[path.stem] = f"{output['sha256']} {frames_digest(frames)}"
    return found


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (("--resolution", "144p", "--aspect-ratio", "9:16"), (144, 256)),
        (("--resolution", "240p", "--aspect-ratio", "9:16"), (240, 424)),
        (("--resolution", "240P", "--aspect-ratio", "16:9"), (424, 240)),
        (("--image-size", "37", "53"), (32, 48)),
        (("--image-size", "8", "8"), (8, 8)),
    ],
)
def test_image(here, capsys, size, expected):
    argv = (SAMPLE, "--num-frames", "1", *size, "--num-sampling-steps", "2", "--prompt", "A cat.")
    assert run_script(*argv, "--save-dir", "out") == 0
    assert capsys.readouterr().out == "out/sample_0000.png\n"
    assert names(here / "out") == ["sample_0000.json", "sample_0000.png"]
    frame = read_image(here / "out/sample_0000.png")
    assert frame.shape == (*expected, 3) and frame.std() > 1
    assert frames_digest(frame[None]) == read_recipe(here / "out/sample_0000.png")["output"]["sha256"]


def test_odd_size_is_announced(here, caplog):
    with caplog.at_level(logging.INFO, logger="opensora"):
        argv = ("--image-size", "480", "853", "--num-frames", "1", "--num-sampling-steps", "1", "--prompt", "x")
        assert run_script(SAMPLE, *argv, "--save-dir", "out") == 0
    assert read_image(here / "out/sample_0000.png").shape == (480, 848, 3)
    assert "frames of 480x848 are made for 480x853: sides are multiples of 8" in caplog.text


def test_two_seconds_of_two_prompts_with_two_samples(here, hub_cache, capsys):
    prompts = ("A cat.", "a DOG & a (ball)")
    argv = ("--num-frames", "2s", "--image-size", "64", "64", "--num-sampling-steps", "2", "--num-sample", "2")
    assert run_script(SAMPLE, *argv, "--prompt", *prompts, "--save-dir", "out") == 0
    expected = [f"sample_{prompt:04d}-{sample}" for prompt in (0, 1) for sample in (0, 1)]
    assert capsys.readouterr().out.split() == [f"out/{name}.mp4" for name in expected]
    assert names(here / "out") == sorted(f"{name}{suffix}" for name in expected for suffix in (".mp4", ".json"))

    for name in expected:
        with av.open(str(here / f"out/{name}.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.height, stream.width, stream.average_rate) == (64, 64, Fraction(24))
            assert sum(1 for _ in container.decode(stream)) == stream.frames == 51
    assert len(set(digests(here / "out").values())) == 4

    recipe = read_recipe(here / "out/sample_0001-1.mp4")
    assert recipe == read_recipe(here / "out/sample_0001-1.json")
    assert recipe["prompt"] == prompts[1] and recipe["encoded_prompts"] == ["a dog a ball aesthetic score: 6.5."]
    assert (recipe["seed"], recipe["sample_index"]) == (42, 1)
    assert recipe["settings"]["num_frames"] == "2s" and recipe["settings"]["scheduler"]["num_sampling_steps"] == 2
    assert recipe["program"]["torch"] == torch.__version__ and recipe["program"]["opensora"] == opensora.__version__
    for part in ("model", "vae", "text_encoder"):
        folder = snapshot(hub_cache, part)
        assert recipe["weights"][part] == summarize(folder, read_state_dict(folder)).sha256
    assert recipe["weights"]["tokenizer"] == tokenizer_hash(snapshot(hub_cache, "text_encoder"))


def test_weights_named_by_folder_and_by_file(here, hub_cache):
    assert run_script(SAMPLE, *SMALL, "--prompt", "x", "--save-dir", "hub") == 0
    vae, text_encoder = (snapshot(hub_cache, part) for part in ("vae", "text_encoder"))
    config = (snapshot(hub_cache, "model") / "config.json").read_text()
    tensors = read_state_dict(snapshot(hub_cache, "model"))

    (here / "checkpoint/model").mkdir(parents=True)  # as training writes it
    (here / "checkpoint/model/config.json").write_text(config)
    save_file(tensors, here / "checkpoint/model/model.safetensors")
    save_file(tensors, here / "checkpoint/ema.pt")
    shape = ("hidden_size=32", "depth=2", "num_heads=2", "caption_channels=32")
    save_file(tensors, here / "alone.pth")
    for index, model in enumerate(
        [("checkpoint",), ("checkpoint/model/model.safetensors",), ("checkpoint/ema.pt",)]
        + [("alone.pth", "--cfg-options", *(f"model.{keyword}" for keyword in shape))]
    ):
        argv = ("--vae-path", vae / "model.safetensors" if index else vae, "--ckpt-path", *model)
        text_path = ("--text-encoder-path", text_encoder / "model.safetensors" if index else text_encoder)
        assert run_script(SAMPLE, *SMALL, "--prompt", "x", "--save-dir", index, *text_path, *argv) == 0
        assert digests(here / str(index)) == digests(here / "hub")


@pytest.mark.parametrize("num_frames", ["1", "2", "16", "18", "image"])
def test_every_number_of_frames(here, num_frames):
    assert run_script(SAMPLE, *SMALL, "--num-frames", num_frames, "--prompt", "x", "--save-dir", "out") == 0
    media = next(path for path in (here / "out").iterdir() if path.suffix != ".json")
    frames = read_image(media)[None] if media.suffix == ".png" else read_video(media)[0]
    assert len(frames) == (1 if num_frames == "image" else int(num_frames)) and frames.std() > 1


def test_the_same_prompt_gives_the_same_bytes_in_any_company(here):
    prompts = ["a red circle", "two dogs run over a meadow, then rest", "x", "a wave"]
    (here / "prompts.txt").write_text("\n".join(prompts))
    runs = {
        "alone": ("--prompt", prompts[0]),
        "batch": ("--prompt", *prompts, "--batch-size", "4"),
        "reversed": ("--prompt", *reversed(prompts), "--batch-size", "3"),
        "last_of_three": ("--prompt", prompts[2], prompts[1], prompts[0]),
        "from_file": ("--prompt-path", "prompts.txt"),
        "slice": ("--prompt-path", "prompts.txt", "--start-index", "1", "--end-index", "3", "--batch-size", "2"),
        "samples": ("--prompt", prompts[1], prompts[0], "--num-sample", "3", "--batch-size", "6"),
    }
    for name, argv in runs.items():
        assert run_script(SAMPLE, *SMALL, *argv, "--save-dir", name) == 0
    made = {name: digests(here / name) for name in runs}

    assert len(set(made["batch"].values())) == 4
    assert made["alone"] == {"sample_0000": made["batch"]["sample_0000"]}
    assert made["reversed"]["sample_0003"] == made["alone"]["sample_0000"]
    assert sorted(made["reversed"].values()) == sorted(made["batch"].values())
    assert made["last_of_three"]["sample_0002"] == made["alone"]["sample_0000"]
    assert made["from_file"] == made["batch"]
    assert made["slice"] == {name: made["batch"][name] for name in ("sample_0001", "sample_0002")}
    assert made["samples"]["sample_0001-0"] == made["alone"]["sample_0000"]
    assert made["samples"]["sample_0000-0"] == made["batch"]["sample_0001"]
    assert len(set(made["samples"].values())) == 6


def test_noise_belongs_to_the_request(here, monkeypatch):
    drawn = []
    draw = pipeline.initial_noise
    monkeypatch.setattr(pipeline, "initial_noise", lambda *key: drawn.append(key) or draw(*key))
    assert run_script(SAMPLE, *SMALL, "--prompt", "a", "b", "--num-sample", "2", "--seed", "7", "--save-dir", "o") == 0
    assert drawn == [(7, sample, 0, (4, 5, 2, 3)) for sample in (0, 1, 0, 1)]


def test_seed_and_guidance_matter(here):
    base = (SAMPLE, *SMALL, "--prompt", "a")
    for folder, argv in {"a": (), "b": ("--seed", "43"), "c": ("--cfg-scale", "1"), "d": ("--aes", "4")}.items():
        assert run_script(*base, *argv, "--save-dir", folder) == 0
    assert len({digests(here / folder)["sample_0000"] for folder in "abcd"}) == 4


@pytest.mark.parametrize(
    ("argv", "name", "fps"),
    [
        (("--sample-name", "long", "--save-fps", "8"), "long_0000", 8),
        (("--prompt-as-path", "--frame-interval", "3", "--cfg-options", "save_fps=None"), "a_b", 8),
    ],
)
def test_names_and_frame_rates(here, argv, name, fps):
    assert run_script(SAMPLE, *SMALL, "--prompt", "a/b", "--save-dir", "out", *argv) == 0
    assert names(here / "out") == [f"{name}.json", f"{name}.mp4"]
    assert read_video(here / f"out/{name}.mp4")[1] == fps


def test_prompt_as_path_keeps_what_exists(here, capsys, monkeypatch):
    argv = (SAMPLE, *SMALL, "--prompt-as-path", "--save-dir", "out", "--prompt")
    (here / "out").mkdir()
    (here / "out/a.mp4").write_bytes(b"kept")
    (here / "out/b.png").write_bytes(b"an image is no video")
    assert run_script(*argv, "a", "b") == 0
    assert capsys.readouterr().out == "out/b.mp4\n"
    assert (here / "out/a.mp4").read_bytes() == b"kept"

    monkeypatch.setattr("opensora.components.build_text_encoder", None)
    assert run_script(*argv, "a", "b") == 0
    assert capsys.readouterr().out == ""


def test_the_configuration_wins_over_the_config_json_of_the_checkpoint(here):
    folder = make_tiny_stdit3(here / "other", input_sq_size=256)
    assert run_script(SAMPLE, *SMALL, "--prompt", "x", "--save-dir", "a", "--ckpt-path", folder) == 0
    argv = ("--ckpt-path", folder, "--cfg-options", "model.input_sq_size=512")
    assert run_script(SAMPLE, *SMALL, "--prompt", "x", "--save-dir", "b", *argv) == 0
    assert run_script(SAMPLE, *SMALL, "--prompt", "x", "--save-dir", "c") == 0
    assert digests(here / "b") == digests(here / "c") != digests(here / "a")


def test_sharded_model(here, hub_cache):
    tensors = read_state_dict(snapshot(hub_cache, "model"))
    save_pretrained(tensors, here / "shards", {}, max_shard_bytes=50_000)
    (here / "shards/config.json").write_text((snapshot(hub_cache, "model") / "config.json").read_text())
    assert len(list((here / "shards").glob("*.safetensors"))) > 1
    for folder, argv in {"a": ("--ckpt-path", "shards"), "b": ()}.items():
        assert run_script(SAMPLE, *SMALL, "--prompt", "x", "--save-dir", folder, *argv) == 0
    assert digests(here / "a") == digests(here / "b")


def test_program_of_its_own(here, hub_cache):
    environment = {**os.environ, "HF_HUB_CACHE": str(hub_cache), "PYTHONPATH": str(SCRIPT.parents[1])}
    argv = (SAMPLE, "--num-frames", "1", "--image-size", "64", "64", "--num-sampling-steps", "2", "--prompt", "a cat")
    done = subprocess.run(
        [sys.executable, SCRIPT, *argv, "--save-dir", "out"],
        env=environment, cwd=here, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "out/sample_0000.png\n"), done.stderr
    assert done.stderr.count(" parameters, fp32, sha256 ") == 3 and "Warning" not in done.stderr
    assert read_image(here / "out/sample_0000.png").shape == (64, 64, 3)


@needs_shipped
def test_embedded_model_from_prompt_to_video(here, capsys):
    prompt = "a red circle moving right on a black background"
    others = ["a blue square growing on a gray background", "a white triangle standing still", "a cyan circle"]
    assert main(["generate", prompt, "--save-dir", "alone", "--preview"]) == 0
    assert capsys.readouterr().out.split() == ["alone/sample_0000.mp4", "alone/sample_0000.preview.png"]
    frames, fps = read_video(here / "alone/sample_0000.mp4")
    assert frames.shape == (17, 64, 64, 3) and fps == 8
    background = np.median(frames.reshape(-1, 3), axis=0)
    assert background.max() < 60

    assert main(["generate", *others, prompt, "--batch-size", "4", "--save-dir", "batch"]) == 0
    assert digests(here / "batch")["sample_0003"] == digests(here / "alone")["sample_0000"]
