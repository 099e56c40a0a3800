"""Stage scores against transformers' CLIP and its own image processor, with tiny random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from opensora.curation.clip import Clip
from opensora.curation.curate import CurationSettings, curate
from opensora.curation.execution.ledger import open_ledger
from opensora.curation.execution.settings import ExecutorSettings
from opensora.curation.stages.scores import Scores
from opensora.datasets.transforms import clip_pixels
from opensora.datasets.video import read_video, write_image
from opensora.errors import ConfigError, MediaError, OpenSoraError, WeightsError
from tests.curation.footage import footage, texture
from tests.full import FULL
from tests.tiny_clip import POSITIONS, VISION, make_clip_folder, seeded

WIDTHS = (12, 1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)  # of the linear layers in the published file
SERIAL = ExecutorSettings(workers=0)
CAPTION = "a red car"
HUGE = '{"text_config": {}, "vision_config": {"image_size": 1e9}}'


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scores, nn.Module, dict[str, torch.Tensor]]:
    """The stage, transformers' CLIP, and the tensors of the head."""
    folder = tmp_path_factory.mktemp("clip")
    _, clip = make_clip_folder(folder)
    head = {}
    for place, width, out in zip(PLACES, WIDTHS, WIDTHS[1:], strict=False):
        head[f"layers.{place}.weight"] = seeded(place, lambda o=out, w=width: torch.randn(o, w)) / width**0.5
        head[f"layers.{place}.bias"] = seeded(place + 50, lambda o=out: torch.randn(o))
    torch.save(head, folder / "head.pth")
    return Scores(str(folder), str(folder / "head.pth"), "cpu"), clip, head


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return footage(tmp_path_factory.mktemp("video") / "a.mp4", (21,))


def expected(clip: nn.Module, head: dict[str, torch.Tensor], folder: str, frames: np.ndarray, text: str) -> Any:
    """(aes, match) of frames and a text, by transformers."""
    from transformers import CLIPImageProcessor, CLIPTokenizerFast

    side = VISION["image_size"]
    process = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)
    pixels = process(list(frames), return_tensors="pt")["pixel_values"]
    tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    ids = tokenizer([text], truncation=True, max_length=POSITIONS, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = clip(input_ids=ids, pixel_values=pixels)
    x = F.normalize(found.image_embeds, dim=-1)
    for place in PLACES:
        x = F.linear(x, head[f"layers.{place}.weight"], head[f"layers.{place}.bias"])
    return float(x.mean()), float(found.logits_per_image[1, 0])


@pytest.mark.parametrize("text", [CAPTION, "a red bird over the sea at dawn"])
def test_scores_are_those_of_transformers(weights: Any, video: Path, text: str) -> None:
    """Of the frames at 0.1, 0.5 and 0.9; a long caption is cut to CLIP's tokens, which a column tells."""
    stage, clip, head = weights
    stage.setup()
    found = stage.process(Clip(str(video), row={"text": text}))
    frames, _ = read_video(video)
    aes, match = expected(clip, head, stage.clip, frames[[2, 10, 18]], text)
    assert found["aes"] == pytest.approx(aes, abs=1e-4) and found["match"] == pytest.approx(match, abs=1e-3)
    assert (found["match_tokens"] > POSITIONS) == (text != CAPTION)


@pytest.mark.parametrize("size", [(96, 160), (161, 97), (31, 31), (7, 200), (500, 9)])
def test_pixels_are_those_of_transformers(size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessor

    image = texture(3, *size)
    theirs = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24)(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(clip_pixels(image, 24), theirs[0], atol=1e-5, rtol=0)


def test_a_thread_more_changes_nothing(weights: Any, video: Path) -> None:
    stage, _, _ = weights
    before = torch.get_num_threads()
    results = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        results.append(stage.process(Clip(str(video), row={"text": CAPTION})))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert results[0] == results[1]


def test_scores_in_a_table(weights: Any, video: Path, tmp_path: Path) -> None:
    """One clip with two captions has two matches; damaged files are left out; new weights score again."""
    stage, _, _ = weights
    write_image(texture(5), tmp_path / "still.png")
    (tmp_path / "broken.mp4").write_bytes(video.read_bytes()[:2500])
    table = tmp_path / "in.csv"
    lines = [f"{video},{CAPTION}", f"{video},a dog", f"{tmp_path}/still.png,", f"{tmp_path}/broken.mp4,{CAPTION}"]
    table.write_text("\n".join(["path,text", *lines, ""]))
    folder = shutil.copytree(stage.clip, tmp_path / "weights")
    options = {"clip": str(folder), "aesthetic": str(folder / "head.pth"), "device": "cpu"}
    settings = CurationSettings(
        str(table), str(tmp_path / "out.jsonl"), ("scores",), {"scores": options}, executor=SERIAL
    )
    assert curate(settings)[:3] == (3, 1, 4)
    first, second, still = map(json.loads, Path(settings.target).read_text().splitlines())
    assert first["aes"] == second["aes"] and first["match"] != second["match"]
    assert still["match"] is None and still["match_tokens"] is None and still["aes"] is not None
    with open_ledger(f"{settings.target}.ledger") as ledger:
        [tool] = ledger.tools().values()
    assert set(tool["weights"]) == {"clip", "aesthetic", "tokenizer"} and not tool["settings"]
    if FULL:  # each worker imports CLIP
        pool = replace(settings, target=str(tmp_path / "pool.jsonl"), executor=ExecutorSettings(workers=2))
        curate(pool)
        assert Path(pool.target).read_text() == Path(settings.target).read_text()
    moved = shutil.copytree(folder, tmp_path / "moved")
    options = {"clip": str(moved), "aesthetic": str(moved / "head.pth"), "device": "cpu"}
    again = replace(settings, options={"scores": options}, force=True)
    assert curate(again).computed == 0
    assert curate(replace(again, options={"scores": {**options, "aesthetic": ""}})).computed == 4


@pytest.fixture
def copy(weights: Any, tmp_path: Path) -> Iterator[Path]:
    yield shutil.copytree(weights[0].clip, tmp_path / "clip")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text(HUGE), "image_size"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors"),
        (lambda folder: (folder / "vocab.json").unlink(), "no CLIP tokenizer"),
        (lambda folder: torch.save({"layers.0.weight": torch.zeros(3)}, folder / "head.pth"), "does not fit"),
        (lambda folder: torch.save({"layers.0.weight": torch.device}, folder / "head.pth"), "head.pth"),
        (lambda folder: (folder / "head.pth").unlink(), "scores.aesthetic: .* does not exist"),
    ],
    ids=["config", "sizes", "weights", "tokenizer", "head", "code", "missing"],
)  # fmt: skip
def test_unusable_weights_are_one_line(copy: Path, spoil: Any, words: str) -> None:
    spoil(copy)
    stage = Scores(str(copy), str(copy / "head.pth"), "cpu")
    with pytest.raises(WeightsError, match=words) as error:
        stage.check()
        stage.setup()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stage", "words"),
    [(Scores(), "scores.clip=FOLDER"), (Scores("gone"), "does not exist"), (Scores("x", device="cudda"), "cudda"),
     (Scores("x", workers=0), "scores.workers")],
)  # fmt: skip
def test_what_is_refused_at_once(stage: Scores, words: str) -> None:
    with pytest.raises(OpenSoraError, match=words) as error:
        stage.check()
    assert isinstance(error.value, ConfigError | WeightsError)


def test_a_picture_too_long_and_thin_is_left_out(weights: Any, tmp_path: Path) -> None:
    write_image(np.zeros((2, 1000, 3), np.uint8), tmp_path / "a.png")
    with pytest.raises(MediaError, match="too long and thin"):
        weights[0].process(Clip(str(tmp_path / "a.png")))
