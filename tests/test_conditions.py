"""References, loops and edits on tiny checkpoints: what is kept, how long the result is, what is refused."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import opensora
from opensora import registry
from opensora.checkpoints import builder
from opensora.cli import main
from opensora.config import read_config
from opensora.config.settings import InferenceSettings
from opensora.datasets.aspect import get_num_frames
from opensora.datasets.video import read_video, to_uint8, write_image, write_video
from opensora.errors import ConfigError
from opensora.pipeline.conditioning import overlapping_frames
from opensora.pipeline.mask_strategy import parse_mask_strategy
from opensora.pipeline.recipe import read_recipe
from opensora.pipeline.references import read_reference
from tests.checkpoints import SAMPLE, run_script, snapshot
from tests.full import some

CPU = torch.device("cpu")
SIZE = (16, 24)
SMALL = ("--image-size", *SIZE, "--num-sampling-steps", "2", "--save-dir", "out")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    write_image(generator.integers(0, 256, (32, 40, 3), dtype=np.uint8), "image.png")
    write_video(generator.integers(0, 256, (34, 16, 24, 3), dtype=np.uint8), "clip.mp4", 24)
    return tmp_path


def made(name: str = "sample_0000") -> np.ndarray:
    return read_video(f"out/{name}.mp4")[0]


def refused(capsys: pytest.CaptureFixture, *argv: object) -> str:
    assert run_script(SAMPLE, *SMALL, "--prompt", "x", *argv) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    assert not Path("out").exists()
    return error


def test_frames_that_are_all_given_come_out_as_the_autoencoder_sees_them(hub_cache: Path) -> None:
    argv = ("--num-frames", "34", "--reference-path", "clip.mp4", "--mask-strategy", "0,0,0,0,10")
    assert run_script(SAMPLE, *SMALL, "--prompt", "x", *argv) == 0
    vae, _ = builder.load_component(
        {"type": "OpenSoraVAE_V1_2", "from_pretrained": str(snapshot(hub_cache, "vae"))}, "vae", CPU, torch.float32
    )
    with torch.no_grad():
        latents = vae.encode(read_reference("clip.mp4", SIZE)[None], sample=False)
        expected = to_uint8(vae.decode(latents, num_frames=34)[0])
    found = read_recipe("out/sample_0000.mp4")["output"]
    write_video(expected, "expected.mp4", 24)
    assert found["num_frames"] == 34
    assert np.abs(made().astype(int) - read_video("expected.mp4")[0]).mean() < 1


def test_an_edit_moves_away_from_its_reference_with_its_rate() -> None:
    distances = []
    for rate in (0.0, 0.1, 0.9):
        argv = ("--num-frames", "17", "--reference-path", "clip.mp4", "--mask-strategy", f"0,0,0,0,5,{rate}")
        argv += ("--num-sampling-steps", "5", "--sample-name", str(rate))
        assert run_script(SAMPLE, *SMALL, "--prompt", "x", *argv) == 0
        distances.append(np.abs(made(f"{rate}_0000").astype(int) - made("0.0_0000")).mean())
    assert 0 == distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize(("loop", "length", "frames"), [(3, 5, 51 * 3 - 2 * 17), (2, 10, 51 * 2 - 34)])
def test_loops_have_the_documented_length(loop: int, length: int, frames: int) -> None:
    argv = ("--num-frames", "51", "--loop", loop, "--condition-frame-length", length)
    assert run_script(SAMPLE, *SMALL, "--prompt", "|0|rain|1|sun", *argv) == 0
    assert len(made()) == frames
    texts = read_recipe("out/sample_0000.mp4")["encoded_prompts"]
    assert texts == ["rain aesthetic score: 6.5.", *["sun aesthetic score: 6.5."] * (loop - 1)]


@pytest.mark.parametrize("sampler", ["rflow", "iddpm"])
@some(1)
def test_an_image_condition_replays(capsys: pytest.CaptureFixture, sampler: str) -> None:
    scheduler = f"scheduler={{'type': '{sampler}', 'num_sampling_steps': 3, 'cfg_scale': 4.0}}"
    prompt = 'a wave.{"reference_path": "image.png;image.png", "mask_strategy": "0;0,1,0,-1,1"}'
    argv = ("--num-frames", "34", "--loop", "2", "--cfg-options", scheduler)
    assert run_script(SAMPLE, *SMALL, "--prompt", prompt, *argv) == 0
    assert len(made()) == 51
    capsys.readouterr()
    assert main(["replay", "out/sample_0000.mp4", "--save-dir", "again"]) == 0
    assert "identical" in capsys.readouterr().out


BAD = [
    (
        ("--num-frames", "51", "--loop", "2", "--condition-frame-length", "4"),
        "4 latent frames are not a multiple of 5; give --condition-frame-length 5",
    ),
    (("--num-frames", "17", "--loop", "2"), "clips of 17 frames have 5 latent frames; give --num-frames 34"),
    (("--num-frames", "20", "--loop", "2"), "6 latent frames are not a multiple of 5; give --num-frames 34"),
    (("--num-frames", "17", "--reference-path", "image.png", "--mask-strategy", "0,0,0,9"), "is outside its 5"),
    (("--num-frames", "17", "--reference-path", "image.png", "--mask-strategy", "0,1"), "names reference 1"),
    (("--num-frames", "17", "--reference-path", "image.png", "--mask-strategy", "1"), "is for loop 1 of 1"),
    (("--num-frames", "17", "--mask-strategy", "0"), "names reference 0, but there are 0"),
]


@pytest.mark.parametrize(("argv", "problem"), BAD)
def test_what_cannot_be_followed_is_refused_before_any_weight_is_read(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, argv: tuple, problem: str
) -> None:
    monkeypatch.setattr("opensora.checkpoints.builder.load_weights", None)
    assert problem in refused(capsys, *argv)


def with_words(*argv: object, frames: int = 34) -> dict:
    """The recipe of a clip made with readable conditions, which holds the tuples that they became."""
    assert run_script(SAMPLE, *SMALL, "--num-frames", frames, "--prompt", "x", *argv) == 0
    return read_recipe("out/sample_0000.mp4")["settings"]


@pytest.mark.parametrize(
    ("argv", "reference_path", "mask_strategy"),
    [
        (("--image", "image.png"), "image.png#hold=17", "0,0,0,0,1,0.0"),
        (
            ("--first-frame", "image.png", "--last-frame", "image.png"),
            "image.png#hold=17;image.png#hold=17",
            "0,0,0,0,1,0.0;0,1,-1,-1,1,0.0",
        ),
        (("--extend", "clip.mp4"), "clip.mp4#last=17", "0,0,0,0,5,0.0"),
        (("--extend", "clip.mp4", "--keep", "0.5s"), "clip.mp4#last=17", "0,0,0,0,5,0.0"),
        (("--edit", "clip.mp4", "--strength", "0.4"), "clip.mp4#first=34", "0,0,0,0,10,0.4"),
    ],
)
@some(3)
def test_words_become_tuples(capsys, argv: tuple, reference_path: str, mask_strategy: str) -> None:
    settings = with_words(*argv)
    assert (settings["reference_path"], settings["mask_strategy"]) == ([reference_path], [mask_strategy])
    assert settings["align"] is None and settings["image"] is None and settings["extend"] is None
    capsys.readouterr()
    assert main(["replay", "out/sample_0000.mp4", "--save-dir", "again"]) == 0
    assert "identical" in capsys.readouterr().out


def test_an_extended_clip_begins_with_what_was_kept(hub_cache: Path) -> None:
    with_words("--extend", "clip.mp4")
    where = {"type": "OpenSoraVAE_V1_2", "from_pretrained": str(snapshot(hub_cache, "vae"))}
    vae, _ = builder.load_component(where, "vae", CPU, torch.float32)
    with torch.no_grad():
        kept = read_reference("clip.mp4", SIZE)[None, :, -17:]
        expected = to_uint8(vae.decode(vae.encode(kept, sample=False), num_frames=17)[0])
    write_video(expected, "expected.mp4", 24)
    assert np.abs(made()[:17].astype(int) - read_video("expected.mp4")[0]).mean() < 1


WORDS = [
    (("--image", "gone.png"), "gone.png"),
    (("--image", "image.png", "--first-frame", "image.png"), "cannot be combined"),
    (("--edit", "clip.mp4", "--last-frame", "image.png"), "cannot be combined"),
    (("--keep", "1s"), "--keep belongs to --extend"),
    (("--strength", "0.5"), "--strength belongs to --edit"),
    (("--extend", "clip.mp4", "--keep", "soon"), "'soon' is not a number of frames"),
    (("--extend", "clip.mp4", "--keep", "34"), "takes 34 frames, in whole groups of 17; of 34 nothing is left"),
    (("--extend", "image.png"), "has 1 frames, and 17 are to be kept"),
    (("--last-frame", "clip.mp4"), "has 34 frames where an image is needed"),
    (("--image", "image.png", "--mask-strategy", "0"), "use one of the two forms"),
    (("--edit", "clip.mp4", "--strength", "1.5"), "strength must be at most 1; it is 1.5"),
]


@pytest.mark.parametrize(("argv", "problem"), WORDS)
def test_words_that_make_no_sense(capsys, monkeypatch, argv: tuple, problem: str) -> None:
    monkeypatch.setattr("opensora.checkpoints.builder.load_weights", None)
    assert problem in refused(capsys, "--num-frames", "34", *argv)


STRATEGIES = [
    "0;" * 10**6 + "0", "0," + "9" * 5000, "0,0,0,0,1000000000000000000", "0,-10000000", "1_0", "0,0,0,0,1,nan",
    "0,0,0,0,1,1_0e-3",
]  # fmt: skip


@pytest.mark.parametrize("text", STRATEGIES, ids=lambda text: text[:20])
def test_mask_strategies_have_bounds(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mask_strategy(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and "mask_strategy" in str(caught.value)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("flag", ["--image", "--last-frame", "--extend", "--edit", "--reference-path"])
@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "several"])
def test_given_files_are_regular_files(capsys, monkeypatch, flag: str, kind: str) -> None:
    monkeypatch.setattr("opensora.checkpoints.builder.load_weights", None)
    name = {"device": "/dev/zero", "several": "image.png;;clip.mp4"}.get(kind, "given.png")
    if kind == "folder":
        Path(name).mkdir()
    elif kind == "fifo":
        os.mkfifo(name)
    error = refused(capsys, "--num-frames", "34", flag, name)
    if kind == "several":
        assert "';'" in error or "image.png;;clip.mp4" in error
    else:
        assert "no such file, but a folder, device or pipe" in error


CONFIGS = sorted(Path(opensora.__file__).parents[1].glob("configs/*/inference/*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "/".join(path.parts[-3:]))
@pytest.mark.parametrize("loop", [2, 5])
@some(22)
def test_loop_works_with_every_models_defaults_or_one_message_says_what_to_change(path: Path, loop: int) -> None:
    config = read_config(path)
    if "scheduler" not in config:
        pytest.skip("an autoencoder's own configuration")
    settings = InferenceSettings.from_config({"num_frames": 16, **config, "loop": loop}, str(path))
    kind = settings.vae["type"]
    with torch.device("meta"):
        vae = registry.build({"type": kind, **({} if kind == "VideoAutoencoderKL" else {"micro_frame_size": 17})})
    frames = get_num_frames(settings.num_frames)
    try:
        overlap = overlapping_frames(vae, frames, settings)
    except ConfigError as error:
        frames, settings = told(str(error), frames, settings)
        overlap = overlapping_frames(vae, frames, settings)  # one change is enough
    assert 0 < overlap < frames


def told(message: str, frames: int, settings: InferenceSettings) -> tuple[int, InferenceSettings]:
    """What to do as the remedy of a message says: one flag, or two where no single one helps."""
    flags = dict(re.findall(r"--([a-z-]+) (\d+)", message.split(";")[-1]))
    assert set(flags) <= {"num-frames", "condition-frame-length"} and flags
    length = int(flags.get("condition-frame-length", settings.condition_frame_length))
    return int(flags.get("num-frames", frames)), dataclasses.replace(settings, condition_frame_length=length)


@pytest.mark.parametrize("kind", ["OpenSoraVAE_V1_2", "VideoAutoencoderKL"])
@pytest.mark.parametrize("frames", [1, 5, 16, 17, 18, 34, 51, 100])
@pytest.mark.parametrize("length", [0, 1, 4, 5, 7, 10, 60])
@some(40)
def test_what_is_advised_for_loops_works(kind: str, frames: int, length: int) -> None:
    vae = SimpleVae(*((17, 5) if kind == "OpenSoraVAE_V1_2" else (1, 1)))
    settings = InferenceSettings(model={"type": "x"}, num_frames=frames, loop=2, condition_frame_length=length)
    try:
        assert 0 < overlapping_frames(vae, frames, settings) < frames
    except ConfigError as error:
        assert "\n" not in str(error)
        better, changed = told(str(error), frames, settings)
        assert 0 < overlapping_frames(vae, better, changed) < better
        for one in range(1, abs(better - frames)) if better != frames else ():
            for nearer in (frames - one, frames + one):
                with pytest.raises(ConfigError):
                    overlapping_frames(vae, nearer, changed)


class SimpleVae:
    """The frames of an autoencoder that makes `latents` of `frames` at a time."""

    def __init__(self, frames: int, latents: int) -> None:
        self.group = frames, latents

    def get_latent_size(self, size: tuple) -> list:
        frames, latents = self.group
        return [size[0] // frames * latents + -(-(size[0] % frames) // 4), None, None]

    def get_pixel_frames(self, latent: int) -> int:
        if latent % self.group[1]:
            raise ValueError(f"{latent} latent frames are not a multiple of {self.group[1]}")
        return latent // self.group[1] * self.group[0]
