"""Names are understood in the spellings people use, and unknown ones are refused with the remedy."""

from __future__ import annotations

import logging

import pytest

from opensora.datasets.aspect import closest_ratio, get_image_size, get_num_frames, get_num_pixels
from opensora.errors import ConfigError


@pytest.mark.parametrize("ratio", ["9:16", " 9 : 16 ", "9x16", "9/16", "18:32", "0.5625", 0.5625, "0.56"])
def test_spellings_of_a_ratio(ratio: str | float) -> None:
    assert get_image_size("480p", ratio) == (480, 854)


@pytest.mark.parametrize("resolution", ["4k", "4K", " 4k "])
def test_spellings_of_a_resolution(resolution: str) -> None:
    assert get_image_size(resolution, "9:16") == (2160, 3840)
    assert get_num_pixels(resolution) == 8294400


def test_square_families_take_the_nearest_ratio() -> None:
    assert get_image_size(512, "1:1") == (512, 512)
    assert get_image_size("256", "9:16") == (192, 336)
    assert get_image_size("2880", "1:1") == (2880, 2880)


def test_a_far_ratio_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert get_image_size("240p", "1:1") == (320, 320)
        assert not caplog.records
        assert get_image_size("240p", "3:1") == (462, 222)
    assert "3:1" in caplog.text


@pytest.mark.parametrize(
    "ratio", ["", "wide", "9:0", "0:9", "-9:16", "1:2:3", None, "nan", "9:", "1e99999999", "1:1e-99999999", "1_0:9"]
)
def test_not_a_ratio(ratio: str | None) -> None:
    with pytest.raises(ConfigError, match="aspect ratio"):
        get_image_size("480p", ratio)


def test_unknown_resolution_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'721p'.*did you mean '720p'\?.*144p"):
        get_num_pixels("721p")
    with pytest.raises(ConfigError, match="choose one of"):
        get_num_pixels("zzzzzz")


@pytest.mark.parametrize(("value", "frames"), [("2S", 51), (" 4s ", 102), ("image", 1), (17, 17), ("17", 17)])
def test_durations(value: str | int, frames: int) -> None:
    assert get_num_frames(value) == frames


@pytest.mark.parametrize("value", ["3s", "", None, float("nan"), float("inf"), [51]])
def test_not_a_duration(value: object) -> None:
    with pytest.raises(ConfigError, match="number of frames"):
        get_num_frames(value)


def test_a_picture_without_area_has_no_ratio() -> None:
    with pytest.raises(ConfigError, match="positive"):
        closest_ratio(0, 10, "480p")
