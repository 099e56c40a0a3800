"""`opensora data show` shows what a training step is given: the same frames, masks and texts."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.checkpoints import builder
from opensora.cli import main
from opensora.config import find_config, read_config
from opensora.config.settings import TrainSettings
from opensora.datasets import make_table
from opensora.datasets.synthetic.render import make_clip
from opensora.datasets.video import read_image, write_image, write_video
from opensora.models.text_encoder.cleaning import preprocess
from opensora.training.data.batch import TrainingBatch
from opensora.training.data.loader import PrefetchLoader
from opensora.training.data.sources import table_source
from opensora.training.losses.diffusion import DiffusionLoss
from opensora.training.masks import MaskRatios
from opensora.training.preview.captions import CaptionReader, ShownCaption
from opensora.training.preview.clips import ShownClip, latent_frames, training_clips
from opensora.training.preview.sheet import draw_sheet
from opensora.training.step import step_generator

STEPS, BATCH = 3, 3
RATIOS = {"identity": 0.2, "random": 0.4, "quarter_head": 0.4}
BUCKETS = {"144p": {1: (1.0, BATCH), 17: (1.0, BATCH)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview")
    (folder / "videos").mkdir()
    for number in range(7):
        clip = make_clip(3, number, 20, 144, 256)
        write_video(clip.video, folder / "videos" / f"{number}.mp4", 24)
        (folder / "videos" / f"{number}.txt").write_text(clip.text + " and so on" * 30 * (number == 2))
        if number < 4:
            write_image(clip.video[0], folder / "videos" / f"image {number}.png")
    make_table(folder / "videos", folder / "videos.csv")
    return folder


def settings_of(folder: Path, name: str, **values: Any) -> TrainSettings:
    config = read_config(find_config(name))
    config["dataset"]["data_path"] = str(folder / "videos.csv")
    more = {"validate_every": 0, "device": "cpu", "mask_ratios": RATIOS, "batch_size": BATCH, "bucket_config": BUCKETS}
    return TrainSettings.from_config({**config, **more, **values}, name)


class Recorder:
    """A scheduler that records what the model would be trained on."""

    def training_loss(self, model: Any, x: Tensor, cond: dict[str, Tensor], *, mask: Tensor, **_: Any) -> Tensor:
        self.mask, self.without_text = mask, cond["y"][:, 0] < 0
        return torch.zeros(len(x))


def trained_on(settings: TrainSettings) -> list[tuple[dict[str, Any], Recorder]]:
    """The batches of the first steps, and what the loss makes of them."""
    loader, vae = PrefetchLoader(table_source(settings, 1)), builder.build_model(settings.section("vae"), None)
    model = SimpleNamespace(class_dropout_prob=0.1, null_caption=lambda y: -torch.ones_like(y))
    found = []
    for step in range(STEPS):
        batch, recorder = next(loader), Recorder()
        frames, height, width = vae.get_latent_size(batch["size"])
        count = len(batch["video"])
        latents = torch.zeros(count, 4, frames, height, width)
        encoded = TrainingBatch(latents, {"y": torch.ones(count, 1)}, batch["size"], batch["names"])
        DiffusionLoss(model, recorder, MaskRatios(RATIOS))(encoded, step_generator(settings.seed, step))
        found.append((batch, recorder))
    return found


@pytest.mark.parametrize("name", ["embedded/train/finetune", "embedded/train/finetune_buckets"])
def test_clips_are_those_of_training(folder: Path, name: str) -> None:
    settings = settings_of(folder, name)
    shown = list(islice(training_clips(settings), STEPS * BATCH))
    given = without = 0
    for step, (batch, recorder) in enumerate(trained_on(settings)):
        own = [clip for clip in shown if clip.step == step]
        assert [clip.name for clip in own] == batch["names"]
        for n, clip in enumerate(own):
            assert torch.equal(clip.frames, batch["video"][n]) and clip.fps == batch["fps"][n]
            assert len(clip.given) == clip.frames.shape[1]
            assert set(clip.given) == set((~recorder.mask[n]).tolist())  # a latent frame is never without frames
            assert clip.without_text == bool(recorder.without_text[n])
            given, without = given + any(clip.given), without + clip.without_text
    assert given and {clip.caption.dropped_tokens > 0 for clip in shown} == {True, False}
    later = next(training_clips(settings, step=2))
    assert later.name == shown[2 * BATCH].name and torch.equal(later.frames, shown[2 * BATCH].frames)


def test_latent_frames_of_frames() -> None:
    """4 frames a latent frame; a chunk of 17 is padded at its start, so that its first frame is alone."""
    settings = settings_of(Path(), "embedded/train/finetune")
    vae = builder.build_model({**settings.section("vae"), "micro_frame_size": 17}, None)
    assert latent_frames(vae, 17) == [0] + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert latent_frames(vae, 20) == [*latent_frames(vae, 17), 5, 5, 5]
    assert latent_frames(SimpleNamespace(get_latent_size=lambda size: size), 3) == [0, 1, 2]


def test_captions_are_cut_between_words(folder: Path) -> None:
    reader = CaptionReader(settings_of(folder, "embedded/train/finetune"))
    assert reader.tokenizer is not None
    text = "A red  circle &amp; http://x.org " + "moving " * 60
    caption = reader(text)
    assert f"{caption.kept} {caption.dropped}" == preprocess(text) != text
    kept = len(reader.tokenizer.encode(caption.kept))
    assert kept <= reader.max_length < len(reader.tokenizer.encode(f"{caption.kept} {caption.dropped.split()[0]}"))
    assert caption.tokens == reader.max_length + caption.dropped_tokens
    assert reader("short").dropped == "" and reader("").kept == ""


def test_a_sheet_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(folder)
    show = ["data", "show", "videos.csv", "embedded/train/finetune"]
    settings = ["--cfg-options", "batch_size=3", "validate_every=0"]
    assert main([*show, "--output", "sheet.png", "--clips", "4", *settings]) == 0
    sheet = read_image(folder / "sheet.png")
    assert sheet.shape[0] > 4 * 140 and len({tuple(color) for color in sheet[::4, ::4].reshape(-1, 3).tolist()}) > 10
    for argv, words in (
        (["--output", "sheet.png"], "--force"), (["--output", "x.jpg"], ".png"),
        (["--output", "x.png", "--clips", "0"], "--clips"), (["--output", "x.png", "--step", "-1"], "--step"),
    ):  # fmt: skip
        assert main([*show, *argv, *settings]) == 1
        error = capsys.readouterr().err
        assert words in error and error.strip().count("\n") == 0
    assert main(["data", "show", "gone.csv", "embedded/train/finetune", "--output", "x.png"]) == 1
    assert not Path("x.png").exists()


def test_hostile_captions_are_drawn(folder: Path) -> None:
    frames = torch.zeros(3, 1, 4, 9, dtype=torch.uint8)
    texts = ["<b>\x1b[31m\u202e\n", "x" * 5000, "\u4e2d\u6587 " * 3000, "\ud800", ""]
    clips = [ShownClip(f"{text}.mp4", 0, frames, 24, ShownCaption(text, text), [False], False) for text in texts]
    assert draw_sheet(clips).shape[0] < 3000
