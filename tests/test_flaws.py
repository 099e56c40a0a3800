"""The flaws that find_flaws reports are those that were drawn, and perfect clips have none."""

from __future__ import annotations

import numpy as np
import pytest

from opensora.datasets.synthetic.flaws import find_flaws
from opensora.datasets.synthetic.render import COLOURS, make_clip, render
from tests.full import count


def scene(number=0, **changes):
    return make_clip(3, number, 1, 64, 64).scene._replace(**changes)


def flaws(video, **asked):
    found = find_flaws(video, **asked)
    return {name for name in ("wavers", "melts", "flickers") if getattr(found, name)}


@pytest.mark.parametrize("number", range(count(6, 100)))
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (160, 96)], ids=str)
def test_perfect_clips_have_none(number, size):
    clip = make_clip(5, number, 17, *size)
    noise = np.random.default_rng(number).normal(0, 4, clip.video.shape)  # as a codec leaves
    video = np.clip(clip.video + noise, 0, 255).astype(np.uint8)
    assert not flaws(video, shape=clip.scene.shape, colour=clip.scene.colour)


@pytest.mark.parametrize(("colour", "other"), [("red", "purple"), ("blue", "cyan"), ("yellow", "white")])
def test_one_frame_of_another_colour_wavers(colour, other):
    still = {"shape": "circle", "motion": "standing still", "background": "black", "travel": (0, 0), "end_radius": 12}
    right, wrong = (render(scene(radius=12, colour=name, **still), 17, 64, 64) for name in (colour, other))
    right[9] = wrong[9]
    assert "wavers" in flaws(right, shape="circle", colour=colour)


@pytest.mark.parametrize(("colour", "other"), [("red", "orange"), ("orange", "yellow"), ("purple", "blue")])
@pytest.mark.parametrize(("part", "wavers"), [(0.4, False), (0.6, True)])
def test_a_colour_wavers_once_it_is_nearer_to_another(colour, other, part, wavers):
    video = render(scene(shape="circle", colour=colour, background="black"), 17, 64, 64)
    own, tint = (np.array(COLOURS[name]) for name in (colour, other))
    video[5][(video[5] == own).all(-1)] = own + part * (tint - own)
    assert flaws(video, shape="circle", colour=colour) == ({"wavers"} if wavers else set())


def test_a_part_of_the_object_wavers():
    video = render(one := scene(shape="square", colour="red", background="black"), 17, 64, 64)
    red = np.abs(video[8].astype(int) - COLOURS["red"]).sum(-1) < 10
    red[:, : int(np.flatnonzero(red.any(0)).mean())] = False
    video[8][red] = COLOURS["purple"]
    assert one.shape == "square" and flaws(video, shape="square", colour="red") == {"wavers"}


@pytest.mark.parametrize(("shape", "other"), [("triangle", "square"), ("square", "triangle"), ("circle", "triangle")])
def test_one_frame_of_another_shape_melts(shape, other):
    right, wrong = (
        render(scene(shape=name, colour="white", background="black"), 17, 64, 64) for name in (shape, other)
    )
    right[4] = wrong[4]
    assert "melts" in flaws(right, shape=shape, colour="white")


def test_a_frame_without_the_object_melts():
    video = render(scene(background="black"), 17, 64, 64)
    video[6] = 0
    assert "melts" in flaws(video, shape=scene().shape, colour=scene().colour)


def test_something_that_appears_in_the_background_flickers():
    still = {"start": (20.0, 20.0), "travel": (0, 0), "radius": 8, "end_radius": 8, "background": "gray"}
    video = render(scene(shape="circle", colour="red", **still), 17, 64, 64)
    video[10:, 40:48, 40:48] = 140
    assert flaws(video, shape="circle", colour="red") == {"flickers"}
