"""Clips of known content, clean and degraded, are measured right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from opensora.datasets.synthetic.measure import Measured, measure
from opensora.datasets.synthetic.render import (
    BACKGROUNDS,
    COLOURS,
    NEW_MOTIONS,
    NEW_SHAPES,
    draw_new_scene,
    make_clip,
    make_new_clip,
)
from opensora.datasets.video import read_video, write_video
from opensora.errors import ConfigError
from tests.full import count, some

ATTRIBUTES = ("shape", "colour", "motion", "background")


def clean(video: np.ndarray, path: Path) -> np.ndarray:
    return video


def noisy(video: np.ndarray, path: Path) -> np.ndarray:
    soft = video.astype(np.float32)
    for axis in (1, 2):
        soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    noise = np.random.default_rng(int(video.sum())).normal(0, 6, video.shape)
    return (soft + noise).round().clip(0, 255).astype(np.uint8)


def encoded(video: np.ndarray, path: Path) -> np.ndarray:
    return read_video(write_video(video, path, fps=8))[0]


@pytest.mark.parametrize("degrade", [clean, noisy, encoded])
@some(2)
def test_rendered_clips(degrade, tmp_path):
    right = dict.fromkeys(ATTRIBUTES, 0)
    number = count(20, 300)
    for index in range(number):
        clip = make_clip(11, index, 9, 64, 64, held_out=index % 2 == 0)
        measured = measure(degrade(clip.video, tmp_path / "clip.mp4"))
        for name in ATTRIBUTES:
            right[name] += getattr(measured, name) == getattr(clip.scene, name)
    assert min(right.values()) >= 0.99 * number, right


@pytest.mark.parametrize("size", [(5, 48, 80), (6, 200, 144), (51, 40, 40)])
@some(1)
def test_other_sizes(size):
    for index in range(10):
        clip = make_clip(3, index, *size)
        expected = Measured(*(getattr(clip.scene, name) for name in ATTRIBUTES))
        assert measure(noisy(clip.video, Path())) == expected


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_colours_differ_from_backgrounds_in_brightness(background, colour):
    """Files store color at half the resolution, so that outlines without a change of brightness melt."""
    brightness = np.array([0.299, 0.587, 0.114])
    assert abs(brightness @ np.subtract(COLOURS[colour], BACKGROUNDS[background])) > 20


def test_nothing_to_see():
    assert measure(np.full((5, 64, 64, 3), 74, np.uint8)) == Measured(None, None, None, "gray")
    assert measure(np.full((5, 64, 64, 3), 255, np.uint8)) == Measured(None, None, None, None)
    rough = measure(np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8))
    assert rough.shape is None and rough.motion is None


def test_single_frame_has_no_motion():
    clip = make_clip(0, 0, 1, 64, 64)
    measured = measure(clip.video)
    assert measured.motion is None
    assert (measured.shape, measured.colour) == (clip.scene.shape, clip.scene.colour)


def test_a_speck_beside_the_object_is_ignored():
    clip = make_clip(0, 4, 9, 64, 64)
    video = clip.video.copy()
    video[:, :3, :3] = 255 - video[:, :1, :1]
    assert measure(video) == measure(clip.video)


@pytest.mark.parametrize("new", [*NEW_SHAPES, *NEW_MOTIONS])
def test_what_adapters_teach_is_recognized(new: str) -> None:
    """In every clip, and only where it is asked for; the names the embedded model knows are recognized as before."""
    for index in range(2):
        clip = make_new_clip(1, index, [new], 17, 64, 64)
        assert measure(clip.video, new=True) == clip.scene[:4] and new in clip.text
        assert new not in measure(clip.video)
        known = make_clip(1, index, 17, 64, 64)
        assert measure(known.video, new=True) == measure(known.video) == known.scene[:4]


def test_a_new_shape_with_a_new_motion_is_recognized() -> None:
    for index in range(2):
        clip = make_new_clip(1, index, ["moving diagonally", "bar"], 17, 64, 64)
        assert measure(clip.video, new=True) == clip.scene[:4]
        assert clip.scene[0] == "bar" and clip.scene[2] == "moving diagonally"


@pytest.mark.parametrize(("new", "combinations"), [("bar", 8 * 7 * 4), ("moving diagonally", 3 * 8 * 4)])
def test_clips_of_something_new_show_every_combination_once(new: str, combinations: int) -> None:
    rng = np.random.default_rng(0)
    scenes = [draw_new_scene(rng, index, [new], 64, 64)[:4] for index in range(combinations + 1)]
    assert len(set(scenes)) == combinations and scenes[0] == scenes[-1]


@pytest.mark.parametrize("new", [["circle"], ["bar", "growing"], [""]])
def test_what_is_nothing_new_is_refused(new: list[str]) -> None:
    with pytest.raises(ConfigError, match="is nothing new; choose one of bar, moving diagonally"):
        make_new_clip(1, 0, new, 17, 64, 64)
