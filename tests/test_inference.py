"""scripts/inference.py and `opensora generate` from the command line to playable files, on tiny checkpoints."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

import opensora
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.save import save_file, save_pretrained
from opensora.checkpoints.summary import summarize
from opensora.checkpoints.tokenizer import tokenizer_hash
from opensora.cli import main
from opensora.config import find_config, read_config
from opensora.config.settings import InferenceSettings
from opensora.datasets.video import read_image, read_video
from opensora.errors import ConfigError, WeightsError
from opensora.models.text_encoder.t5 import T5Encoder
from opensora.pipeline import denoise, generation, text_encoding
from opensora.pipeline.job import Job
from opensora.pipeline.job_spec import JobSpec
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.pipeline import VideoPipeline
from opensora.pipeline.recipe import frames_digest, read_recipe
from tests.checkpoints import SAMPLE, SCRIPT, run_script, snapshot
from tests.full import FULL, count, some
from tests.tiny import make_tiny_stdit3, make_tiny_t5

SHIPPED = Path(opensora.__file__).parent / "embedded"
needs_shipped = pytest.mark.skipif(
    not all((SHIPPED / part / "model.safetensors").is_file() for part in ("stdit3", "vae", "text_encoder")),
    reason="the embedded model has not been trained",
)
SMALL = ("--num-sampling-steps", "2", "--image-size", "16", "24", "--num-frames", "5")


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
@some(3)
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
    assert "480x853 becomes 480x848: sides are rounded down to multiples of 8" in caplog.text


def test_two_seconds_of_two_prompts_with_two_samples(here, hub_cache, capsys):
    prompts = ("A cat.", "a DOG & a (ball)")
    argv = ("--num-frames", "2s", "--image-size", "16", "24", "--num-sampling-steps", "1", "--num-sample", "2")
    assert run_script(SAMPLE, *argv, "--prompt", *prompts, "--save-dir", "out") == 0
    expected = [f"sample_{prompt:04d}-{sample}" for prompt in (0, 1) for sample in (0, 1)]
    assert capsys.readouterr().out.split() == [f"out/{name}.mp4" for name in expected]
    assert names(here / "out") == sorted(f"{name}{suffix}" for name in expected for suffix in (".mp4", ".json"))

    for name in expected:
        with av.open(str(here / f"out/{name}.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.height, stream.width, stream.average_rate) == (16, 24, Fraction(24))
            assert sum(1 for _ in container.decode(stream)) == stream.frames == 51
    assert len(set(digests(here / "out").values())) == 4

    recipe = read_recipe(here / "out/sample_0001-1.mp4")
    assert recipe == read_recipe(here / "out/sample_0001-1.json")
    assert recipe["prompt"] == prompts[1] and recipe["encoded_prompts"] == ["a dog a ball aesthetic score: 6.5."]
    assert (recipe["seed"], recipe["sample_index"]) == (42, 1)
    assert recipe["settings"]["num_frames"] == "2s" and recipe["settings"]["scheduler"]["num_sampling_steps"] == 1
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
@some(3)
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
    assert made["slice"] == {name: made["batch"][name] for name in ("sample_0001", "sample_0002")}
    assert made["samples"]["sample_0001-0"] == made["alone"]["sample_0000"]
    assert made["samples"]["sample_0000-0"] == made["batch"]["sample_0001"]
    assert len(set(made["samples"].values())) == 6


def test_noise_belongs_to_the_request(here, monkeypatch):
    drawn = []
    draw = denoise.initial_noise
    monkeypatch.setattr(denoise, "initial_noise", lambda *key: drawn.append(key) or draw(*key))
    assert run_script(SAMPLE, *SMALL, "--prompt", "a", "b", "--num-sample", "2", "--seed", "7", "--save-dir", "o") == 0
    assert drawn == [(7, sample, 0, (4, 2, 2, 3)) for sample in (0, 1, 0, 1)]


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

    monkeypatch.setattr("opensora.checkpoints.builder.build_text_encoder", None)
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


@pytest.mark.skipif(not FULL, reason="tests/test_parallel.py starts the script, under torchrun: set OPENSORA_FULL=1")
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


def frames_of(folder: Path, name: str = "sample_0000") -> np.ndarray:
    return read_video(folder / f"{name}.mp4")[0].astype(int)


NEGATIVE = "blurry, and jittering"


def test_a_negative_prompt_takes_the_place_of_the_null_text(here, capsys):
    base = (SAMPLE, *SMALL, "--dtype", "fp32", "--prompt", "a cat", "--cfg-scale")
    given = {
        "null": ("7",),
        "other": ("7", "--negative-prompt", NEGATIVE),
        "same": ("7", "--negative-prompt", "A CAT aesthetic score: 6.5."),
    }
    for folder, argv in {**given, "alone": ("1",)}.items():
        assert run_script(*base, *argv, "--save-dir", folder) == 0
    assert np.abs(frames_of(here / "null") - frames_of(here / "other")).max() > 1
    assert np.abs(frames_of(here / "same") - frames_of(here / "alone")).max() <= 2  # guidance away from itself
    assert np.abs(frames_of(here / "null") - frames_of(here / "alone")).max() > 2
    assert read_recipe(here / "other/sample_0000.mp4")["settings"]["negative_prompt"] == NEGATIVE
    capsys.readouterr()
    assert main(["replay", "other/sample_0000.mp4", "--save-dir", "again"]) == 0
    assert "identical" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ("--num-frames", "34", "--loop", "2"),
        ("--draft",),
        ("--cfg-options", "scheduler={'type': 'dpm-solver', 'num_sampling_steps': 3, 'cfg_scale': 4.0}"),
        ("--cfg-options", "scheduler={'type': 'iddpm', 'num_sampling_steps': 3, 'cfg_scale': 4.0}"),
        ("--cache", "mag", "--cache-threshold", "0.5"),
        ("--cfg-options", "guidance_interval=(0.0,0.6)"),
        ("--memory", "low"),
    ][: count(3, 7)],
    ids=lambda argv: argv[-1].partition(",")[0],
)
def test_a_negative_prompt_goes_with_everything(here, argv, capsys):
    base = (SAMPLE, "--image-size", "16", "24", "--num-frames", "17", "--num-sampling-steps", "3", "--prompt", "a cat")
    for folder, more in {"with": ("--negative-prompt", NEGATIVE), "without": ()}.items():
        assert run_script(*base, *argv, *more, "--save-dir", folder) == 0
        if "--draft" in argv:
            assert main(["continue", f"{folder}/sample_0000.draft.safetensors"]) == 0
            assert run_script(*base, *more, "--save-dir", f"{folder}-whole") == 0
            assert (frames_of(here / folder) == frames_of(here / f"{folder}-whole")).all()
    assert np.abs(frames_of(here / "with") - frames_of(here / "without")).max() > 0
    capsys.readouterr()
    assert main(["replay", "with/sample_0000.mp4", "--save-dir", "again"]) == 0
    assert "identical" in capsys.readouterr().out


def test_a_negative_prompt_without_guidance_is_said_to_have_no_effect(here, caplog):
    base = (SAMPLE, *SMALL, "--cfg-scale", "1", "--prompt", "a cat")
    assert run_script(*base, "--save-dir", "a") == 0
    assert "negative_prompt" not in caplog.text
    assert run_script(*base, "--negative-prompt", NEGATIVE, "--save-dir", "b") == 0
    assert caplog.text.count("negative_prompt has no effect") == 1
    assert digests(here / "a") == digests(here / "b")


@pytest.mark.parametrize(
    ("negative", "told"),
    [
        ("", "is empty once cleaned"), (" ", "is empty once cleaned"), ("\u4e2d\u6587", "is empty once cleaned"),
        ("x" * 20_001, "has 20,001 characters"), ("y" * 5_001, "5,001 characters"), ("a\ud800", "must be UTF-8 text"),
        ("|0|a|1|b", "one text for all loops"),
    ],
    ids=lambda value: ascii(value)[:12],
)  # fmt: skip
def test_a_negative_prompt_is_checked_like_a_prompt(here, negative, told):
    with pytest.raises(ConfigError, match=told) as caught:
        job_of(settings_of(negative_prompt=negative))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_classes_have_no_negative_prompt(here):
    settings = settings_of(negative_prompt="blurry", prompt=["207"], text_encoder={"type": "classes"})
    with pytest.raises(ConfigError, match="negative_prompt is a text, but these prompts are numbers of classes"):
        job_of(settings)


def job_of(settings: InferenceSettings) -> Job:
    return Job(JobSpec(settings), LoadedModels(settings))


def settings_of(**changes: Any) -> InferenceSettings:
    """A request of two steps on the tiny checkpoints."""
    config = read_config(find_config(SAMPLE)) | dict(
        num_frames=1, image_size=(16, 24), save_dir="out", dtype="fp32", verbose=0
    )
    config["scheduler"] = {**config["scheduler"], "num_sampling_steps": 2}
    return InferenceSettings.from_config(config | {"prompt": ["a cat"]} | changes, "test")


@pytest.mark.parametrize(
    "texts",
    [
        ["a cat", "a cat", "a dog", "a cat", "the sea", "a dog"],
        ["|0|a cat|1|a dog", "a fox", "|0|one|1|two|2|three"][:: 1 if FULL else 2],
    ],
    ids=["repeated", "several texts each"],
)
def test_texts_are_encoded_in_portions(here, texts, monkeypatch):
    loop = 3 if "|" in texts[0] else 1
    settings = settings_of(prompt=texts, loop=loop, num_frames=34 if loop > 1 else 1, negative_prompt="blurry")
    at_once = [one.frames for one in VideoPipeline(settings).generate()]
    monkeypatch.setattr(text_encoding, "HELD_TEXTS", 2)
    encoded, held, events = [], [], []
    encode, generate_batch = T5Encoder.encode_each, generation.generate_batch

    def encoding(self: T5Encoder, given: list[str]) -> Any:
        events.append("text")
        encoded.append(weakref.ref(self))
        return encode(self, given)

    def generating(models: LoadedModels, job: Job, batch: list, texts: dict, *options: Any) -> Any:
        events.append("result")
        held.append(len(texts.keys() - {job.negative_text}))
        assert set(job.texts_of(batch)) <= texts.keys()
        assert encoded[-1]() is None, "the text encoder is kept while frames are made"
        return generate_batch(models, job, batch, texts, *options)

    monkeypatch.setattr(T5Encoder, "encode_each", encoding)
    monkeypatch.setattr(generation, "generate_batch", generating)
    in_portions = [one.frames for one in VideoPipeline(dataclasses.replace(settings, save_dir="again")).generate()]
    assert len(in_portions) == len(at_once) == len(texts)
    assert all((one == other).all() for one, other in zip(in_portions, at_once, strict=True))
    assert events.index("result") < len(events) - 1 - events[::-1].index("text")
    assert max(held) <= max(2, loop if "|2|" in "".join(texts) else 2)


def test_a_text_encoder_that_changes_between_portions_is_refused(here, hub_cache, monkeypatch, tmp_path):
    folder = make_tiny_t5(tmp_path / "t5")
    text_encoder = {"type": "t5", "from_pretrained": str(folder), "model_max_length": 300}
    results = VideoPipeline(settings_of(prompt=["a", "b"], text_encoder=text_encoder)).generate()
    monkeypatch.setattr(text_encoding, "HELD_TEXTS", 1)
    next(results)
    make_tiny_t5(folder, seed=1)
    with pytest.raises(WeightsError, match="has changed since the first prompts were encoded"):
        next(results)


@needs_shipped
def test_embedded_model_from_prompt_to_video(here, capsys):
    prompt = "a red circle moving right on a black background"
    assert main(["generate", prompt, "--steps", "8", "--save-dir", "alone", "--preview"]) == 0
    assert capsys.readouterr().out.split() == ["alone/sample_0000.mp4", "alone/sample_0000.preview.png"]
    frames, fps = read_video(here / "alone/sample_0000.mp4")
    assert frames.shape == (17, 64, 64, 3) and fps == 8
    background = np.median(frames.reshape(-1, 3), axis=0)
    assert background.max() < 60
