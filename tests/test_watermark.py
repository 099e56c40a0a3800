"""`--watermark`: where the text lies, that it can be read on any ground, and that replay writes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from opensora.cli import main
from opensora.datasets.video import read_image, read_video
from opensora.errors import ConfigError
from opensora.pipeline import watermark
from opensora.pipeline.recipe import frames_digest, read_recipe
from tests.checkpoints import SAMPLE, run_script

SIZES = [(64, 64), (64, 112), (256, 144), (480, 848), (1080, 1920)]
ONE = ("--num-sampling-steps", "2", "--image-size", "64", "72", "--verbose", "0", "--prompt", "a cat")


def grounds(size: tuple[int, int]) -> np.ndarray:
    """Frames uint8 [4, H, W, 3]: black, white, grey and noise."""
    frames = np.zeros((4, *size, 3), np.uint8)
    frames[1], frames[2] = 255, 128
    frames[3] = np.random.default_rng(0).integers(0, 256, (*size, 3))
    return frames


@pytest.mark.parametrize("size", SIZES)
def test_the_text_lies_in_the_corner_and_scales(size):
    frames = grounds(size)
    before = frames.copy()
    marked = watermark.draw(frames, True)
    assert (frames == before).all() and marked.dtype == np.uint8 and marked.shape == frames.shape
    rows, columns = np.nonzero((marked[2] != frames[2]).any(axis=-1))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert rows.min() > 0.8 * size[0] and 0 < size[0] - 1 - rows.max() < 0.05 * size[0]
    assert 0 < size[1] - 1 - columns.max() < 0.05 * size[1] and columns.min() >= 0
    assert 0.03 < height / min(size) < 0.2 and 4 < width / height < 8


@pytest.mark.parametrize("size", SIZES)
def test_the_text_is_bright_beside_dark_on_any_ground(size):
    """What is bright on black is bright on every ground, and has black pixels near it."""
    marked = watermark.draw(grounds(size), True).astype(int).mean(axis=-1)
    points = max(round(min(size) / 20), 8)
    for frame in marked:
        bright = np.argwhere(marked[0] > 180)
        assert len(bright) > 0.5 * points**2
        for row, column in bright:
            near = frame[max(row - points, 0) : row + points, max(column - points, 0) : column + points]
            assert frame[row, column] > 180 and near.min() < 20


def test_frames_and_colours_are_marked_alike():
    marked = watermark.draw(np.full((3, 64, 64, 3), 90, np.uint8), True)
    assert (marked == marked[:1]).all() and (marked == marked[..., :1]).all()
    assert (marked == watermark.draw(np.full((3, 64, 64, 3), 90, np.uint8), "AI generated")).all()
    assert (marked != watermark.draw(np.full((3, 64, 64, 3), 90, np.uint8), "AI Generated")).any()


@pytest.mark.parametrize("setting", [False, ""])
def test_no_text(setting):
    frames = grounds((16, 16))
    watermark.check(setting, (16, 16))
    assert watermark.draw(frames, setting) is frames


def test_a_long_text_gets_smaller_letters():
    size, text = (256, 256), "Made by a program for the museum of the city"
    changed = [np.nonzero((watermark.draw(grounds(size), one)[2] != 128).any(axis=-1)) for one in (text, text[:20])]
    (long_rows, long_columns), (short_rows, short_columns) = changed
    assert long_columns.min() >= 0 and np.ptp(long_columns) > np.ptp(short_columns)
    assert np.ptp(long_rows) < np.ptp(short_rows)


@pytest.mark.parametrize(
    ("text", "size", "problem"),
    [
        (True, (64, 32), "'AI generated' cannot be read on frames of 64x32; make them larger, or give a shorter text"),
        ("x" * 400, (480, 848), "cannot be read on frames of 480x848"),
        ("a 猫", (480, 848), "watermark 'a 猫' cannot be drawn; write a text in Latin letters"),
        ("a\nb", (480, 848), "watermark 'a\\nb' cannot be drawn"),
        ("  ", (480, 848), "watermark '  ' cannot be drawn"),
    ],
)
def test_what_cannot_be_read_is_refused(text, size, problem):
    with pytest.raises(ConfigError) as error:
        watermark.check(text, size)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("flags", "text"), [(("--watermark", "True"), "AI generated"), (("--cfg-options", "watermark=(c) Me"), "(c) Me")]
)
def test_an_image_is_marked(tmp_path: Path, monkeypatch, hub_cache, flags, text):
    """Nothing but the text differs from the image without it."""
    monkeypatch.chdir(tmp_path)
    for folder, more in (("bare", ()), ("marked", flags)):
        assert run_script(SAMPLE, *ONE, "--num-frames", "1", *more, "--save-dir", folder) == 0
    recipe, bare = read_recipe("marked/sample_0000.png"), read_image("bare/sample_0000.png")[None]
    marked = watermark.draw(bare, text)
    assert (read_image("marked/sample_0000.png") == marked[0]).all() and (marked != bare).any()
    assert recipe["settings"]["watermark"] == text and recipe["output"]["sha256"] == frames_digest(marked)
    assert read_recipe("bare/sample_0000.png")["settings"]["watermark"] is False


def test_a_video_is_marked_once_in_every_frame(tmp_path: Path, monkeypatch, hub_cache, capsys):
    """Loops go on from frames without the text, and replay writes what was written."""
    monkeypatch.chdir(tmp_path)
    flags = ("--num-frames", "34", "--loop", "2", "--preview")
    for folder, more in (("bare", ()), ("marked", ("--watermark", "True"))):
        assert run_script(SAMPLE, *ONE, *flags, *more, "--save-dir", folder) == 0
    bare, marked = (read_video(f"{folder}/sample_0000.mp4")[0].astype(int) for folder in ("bare", "marked"))
    changed = np.abs(bare - marked).mean(axis=-1)
    assert (changed[:, -12:, -56:].max(axis=(1, 2)) > 60).all() and changed[:, :40].mean() < 3
    previews = [read_image(f"{folder}/sample_0000.preview.png") for folder in ("bare", "marked")]
    assert (previews[0] != previews[1]).any()
    capsys.readouterr()
    assert main(["replay", "marked/sample_0000.mp4", "--save-dir", "again"]) == 0
    assert "identical" in capsys.readouterr().out
    monkeypatch.setattr(watermark, "DEFAULT", "another default")
    assert main(["replay", "marked/sample_0000.json", "--save-dir", "later"]) == 0
