"""Stages on pictures with known values, and the hash of their code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from opensora.curation.clip import Clip
from opensora.curation.stages import code_hash as hashing
from opensora.curation.stages.camera import Camera
from opensora.curation.stages.quality import Quality, laplacian
from opensora.curation.stages.scenes import Scenes, split
from opensora.curation.stages.text import Text, cover
from opensora.curation.stages.thumbnails import thumbnail
from opensora.curation.stages.transitions import Transition, find_transitions, look
from opensora.datasets.video import write_image, write_video
from opensora.errors import MediaError
from tests.curation.footage import scene, texture


def test_every_module_behind_a_stage_is_in_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Camera.__module__
    before, source_file = hashing.code_hash.__wrapped__(module), hashing.source_file
    read: list[str] = []

    def changed(name: str) -> Path | None:
        read.append(name)
        if name != "opensora.curation.stages.optical_flow":
            return source_file(name)
        copy = tmp_path / "optical_flow.py"
        copy.write_text(str(source_file(name).read_text()) + "\n# changed")  # type: ignore[union-attr]
        return copy

    monkeypatch.setattr(hashing, "source_file", changed)
    assert hashing.code_hash.__wrapped__(module) != before
    assert {module, "opensora.curation.clip", "opensora.curation.stages.stage"} <= set(read)


def test_the_hash_of_a_stage_does_not_depend_on_other_stages() -> None:
    assert hashing.code_hash(Camera.__module__) != hashing.code_hash(Quality.__module__)


def image(path: Path, frame: np.ndarray) -> Clip:
    return Clip(str(write_image(frame, path)))


def test_quality_of_known_pictures(tmp_path: Path) -> None:
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, 16:] = 255
    found = Quality().process(image(tmp_path / "half.png", half))
    assert (found["brightness"], found["contrast"], found["highlights"], found["shadows"]) == (0.5, 0.5, 0.5, 0.5)
    assert found["sharpness"] == pytest.approx(255**2 * 2 / 32, rel=1e-3)  # two columns of +-255
    grey = Quality().process(image(tmp_path / "grey.png", np.full((9, 7, 3), 100, np.uint8)))
    assert grey == {"sharpness": 0, "brightness": 0.3922, "contrast": 0, "highlights": 0, "shadows": 0}


def test_blur_lowers_sharpness(tmp_path: Path) -> None:
    sharp = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    blurred = thumbnail(sharp[..., 0].astype(np.float32), 32, 32)
    assert laplacian(blurred).var() < laplacian(sharp[..., 0].astype(np.float32)).var() / 2


def test_text_is_found_where_it_is(tmp_path: Path) -> None:
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.fromarray(texture(3, 144, 256))
    font = ImageFont.load_default(15)
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = draw.textbbox((30, 120), "fields of grain", font)
    draw.text((30, 120), "fields of grain", (255, 255, 255), font, stroke_width=1, stroke_fill=(0, 0, 0))
    found = Text().process(image(tmp_path / "text.png", np.asarray(picture)))
    area = (right - left) * (bottom - top) / (144 * 256)
    assert found["ocr"] in (1, 2) and 0.7 * area < found["text_area"] < 2.5 * area
    assert found["subtitle_area"] == pytest.approx(4 * found["text_area"], rel=0.05)
    nothing = Text().process(image(tmp_path / "none.png", texture(3, 144, 256)))
    assert nothing == {"ocr": 0, "text_area": 0, "subtitle_area": 0}


def test_boxes_outside_of_a_frame_do_not_count() -> None:
    boxes = [np.array([[-50, -50], [50, -50], [50, 50], [-50, 50]], float), np.full((4, 2), 1e9)]
    assert cover(boxes, 100, 100).mean() == pytest.approx(0.25)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (127, 65), (1, 1), (5, 300)])
def test_every_pixel_counts_in_a_thumbnail(height: int, width: int) -> None:
    levels = np.random.default_rng(0).uniform(0, 255, (height, width)).astype(np.float32)
    small = thumbnail(levels, 64, 64)
    rows, columns = small.shape
    weights = np.outer(
        np.diff(np.arange(rows + 1) * height // rows), np.diff(np.arange(columns + 1) * width // columns)
    )
    assert small.shape == (min(64, height), min(64, width))
    assert (small * weights).sum() / weights.sum() == pytest.approx(levels.mean(), rel=1e-4)


def mixed(first: np.ndarray, second: np.ndarray, length: int) -> np.ndarray:
    share = (np.arange(length) + 1)[:, None, None, None] / (length + 1)
    return np.round(first[:length] * (1 - share) + second[:length] * share).astype(np.uint8)


def detailed(seed: int, frames: int) -> np.ndarray:
    """A scene with detail."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (12, 20, 3), dtype=np.uint8)
    clip = scene(seed, frames) // 2
    return clip + (np.repeat(np.repeat(coarse, 8, 0), 8, 1) // 2)


@pytest.mark.parametrize("length", [6, 12, 30])
def test_a_dissolve_is_found(length: int) -> None:
    one, other = detailed(1, 30 + length), detailed(2, 30 + length)
    frames = np.concatenate([one[:30], mixed(one[30:], other, length), other[length:]])
    [found] = find_transitions([look(frame) for frame in frames])
    assert found.kind == "dissolve" and abs(found.start - 30) <= 2 and abs(found.end - 30 - length) <= 2


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("hold", [0, 12])
def test_a_fade_is_found(level: int, hold: int) -> None:
    one, other, blank = detailed(1, 40), detailed(2, 40), np.full((12, 96, 160, 3), level, np.uint8)
    out, back = mixed(one[30:], blank, 10), mixed(blank, other, 10)
    frames = np.concatenate([one[:30], out, blank[:hold], back, other[10:]])
    [found] = find_transitions([look(frame) for frame in frames])
    assert found.kind == "fade" and abs(found.start - 30) <= 3 and abs(found.end - 50 - hold) <= 3


def test_what_is_no_transition() -> None:
    clip = detailed(1, 60)
    dimmed = (clip * (1 - 0.6 * np.sin(np.linspace(0, np.pi, 60))[:, None, None, None])).astype(np.uint8)
    cut = np.concatenate([clip[:30], detailed(2, 30)])
    flash = clip.copy()
    flash[30] = 255
    for frames in (clip, dimmed, cut, flash, clip[:1], clip[:4], np.zeros((30, 4, 4, 3), np.uint8)):
        assert find_transitions([look(frame) for frame in frames]) == []


def test_frames_of_a_fade_belong_to_no_scene(tmp_path: Path) -> None:
    one, other = detailed(1, 40), detailed(2, 40)
    frames = np.concatenate([one[:30], mixed(one[30:], other, 10), other[10:], detailed(3, 8), detailed(4, 20)])
    clip = Clip(str(write_video(frames, tmp_path / "v.mp4", 24)))
    rows = Scenes().process(clip)
    assert [row["transition"] for row in rows] == ["", "dissolve", "cut"] and rows[-1]["num_frames"] == 20
    assert all(abs(row["num_frames"] - 30) <= 2 for row in rows[:2])  # the scene of 8 frames is left out
    assert [row["transition"] for row in Scenes(fades=False).process(clip)] == ["", "cut"]
    with pytest.raises(MediaError, match=r"no scene of 100 frames.*lower scenes.min_frames"):
        Scenes(min_frames=100).process(clip)


def test_changes_next_to_one_another() -> None:
    changes = [Transition("cut", 5, 5), Transition("fade", 5, 9), Transition("cut", 12, 12)]
    assert [tuple(one) for one in split(12, changes)] == [(0, 5, ""), (9, 12, "fade")]
