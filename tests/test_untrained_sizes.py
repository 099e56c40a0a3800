"""How sizes are rounded, and whether a model was trained on it."""

from __future__ import annotations

import json

import pytest

from opensora.checkpoints import builder
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError
from opensora.pipeline.checks import warn_untrained
from opensora.pipeline.request import Size, make_size


def test_a_checkpoint_says_what_it_was_trained_on(tmp_path):
    assert builder.trained_sizes(tmp_path) == []
    (tmp_path / "config.json").write_text(json.dumps({"trained_sizes": [[17, 64, 64]]}))
    assert builder.trained_sizes(tmp_path) == [[17, 64, 64]]


@pytest.mark.parametrize(("size", "warned"), [(Size(17, 64, 64), False), (Size(1, 64, 64), True)])
def test_other_sizes_are_warned_off(size: Size, warned: bool, caplog: pytest.LogCaptureFixture):
    warn_untrained(size, [[17, 64, 64]])
    assert ("expect noise at 1 frames of 64x64" in caplog.text) == warned


def test_nothing_is_said_where_nothing_is_known(caplog: pytest.LogCaptureFixture):
    warn_untrained(Size(51, 240, 426), [])
    assert not caplog.text


@pytest.mark.parametrize(
    ("asked", "trained", "warned"),
    [
        ((70, 70), (64, 64), False),
        ((240, 426), (240, 426), False),
        ((424, 240), (426, 240), False),
        ((72, 64), (64, 64), True),
    ],
)
def test_the_size_that_is_made_counts(asked, trained, warned, caplog: pytest.LogCaptureFixture):
    """Sides of 70 pixels become 64: it is 64x64 that the model has been trained on, or not."""
    size = Size(17, *asked)
    warn_untrained(size, [[17, *trained]])
    assert bool(caplog.text) == warned
    assert f"{asked[0]}x{asked[1]}" not in caplog.text or size.rounded == size


@pytest.mark.parametrize(
    ("asked", "made"), [((70, 70), (64, 64)), ((8, 9), (8, 8)), ((480, 854), (480, 848)), ((72, 1000), (72, 1000))]
)
def test_sides_are_rounded_down_to_multiples_of_eight(asked, made):
    size = Size(1, *asked)
    assert size.rounded == (1, *made)
    assert size.rounded.rounding_note == ""
    assert bool(size.rounding_note) == (asked != made)
    assert not size.rounding_note or size.rounding_note.startswith(
        f"{asked[0]}x{asked[1]} becomes {made[0]}x{made[1]}:"
    )


def settings(**changes: object) -> InferenceSettings:
    return InferenceSettings(model={"type": "STDiT3"}, **{"num_frames": 17, **changes})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"resolution": "240p"}, "--resolution 240p has no aspect ratio; give --aspect-ratio"),
        ({"resolution": "4k"}, "--resolution 4k has no aspect ratio; give --aspect-ratio"),
        ({"resolution": "512"}, "--resolution 512 has no aspect ratio; give --aspect-ratio"),
        ({"aspect_ratio": "9:16"}, "--aspect-ratio 9:16 gives no number of pixels; give --resolution"),
        ({"aspect_ratio": "1"}, "--aspect-ratio 1 gives no number of pixels; give --resolution"),
        ({"resolution": "241p"}, "did you mean '240p'"),
        ({"aspect_ratio": "x"}, "aspect ratio 'x' is not known"),
        ({}, "the size is missing"),
    ],
)  # fmt: skip
def test_half_a_size_says_which_half_is_missing(given, told):
    with pytest.raises(ConfigError, match=told):
        make_size(settings(**given))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "given",
    [
        {"image_size": (10**9, 64)}, {"image_size": (64, 10**40)}, {"image_size": (16384, 16384), "num_frames": 60},
        {"image_size": (64, 64), "num_frames": 10**18}, {"image_size": (64, 64), "num_frames": 0},
        {"image_size": (64, 64), "loop": 10**9}, {"image_size": (720, 1280), "num_frames": 816, "loop": 100},
        {"resolution": "240p", "aspect_ratio": "1e999999999"}, {"resolution": "240p", "aspect_ratio": "1/1e-888888888"},
        {"resolution": "240p", "aspect_ratio": "9" * 5000},
    ],
)  # fmt: skip
def test_numbers_without_bound_are_refused_at_once(given):
    with pytest.raises(ConfigError) as caught:
        make_size(settings(**given))
    assert "\n" not in str(caught.value)
