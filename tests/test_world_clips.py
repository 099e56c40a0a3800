"""Clips of the drawn world as training data: captions, labels, continued clips, windows, rendering ahead."""

from __future__ import annotations

import os
from itertools import islice

import numpy as np
import pytest
import torch

from opensora.datasets.synthetic.ahead import VideosAhead, map_ahead
from opensora.datasets.synthetic.dataset import MixedClips, rendered_clips
from opensora.datasets.synthetic.world import scenes
from opensora.datasets.synthetic.world.assess import ALL, assess
from opensora.datasets.synthetic.world.captions import caption, motion_score
from opensora.datasets.synthetic.world.clips import make_clip, make_continued_clip
from opensora.datasets.synthetic.world.labelled_captions import ATTRIBUTES, NONE, draw_caption, labels
from opensora.datasets.synthetic.world.motions import CAMERA, MOTIONS
from opensora.datasets.synthetic.world.render import World, draw_world, render
from opensora.errors import ConfigError
from tests.full import count

SEED = int(os.environ.get("OPENSORA_TEST_SEED", "0"))


def clips(**section) -> MixedClips:
    return rendered_clips({"type": "WorldClips", "num_frames": 3, "image_size": (32, 48), **section}, 2, SEED)


def test_shapes_are_drawn_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shape of a scene reaches out of the box in which it is computed."""
    worlds = [World((), scene, camera, SEED) for scene in scenes.PICTURES for camera in ("still", "pan right")]
    boxed = [render(world, 3, 48, 64) for world in worlds]
    paint = scenes.Canvas.paint
    monkeypatch.setattr(
        scenes.Canvas, "paint", lambda self, distance, colour, within=None: paint(self, distance, colour)
    )
    assert all(np.array_equal(render(world, 3, 48, 64), video) for world, video in zip(worlds, boxed, strict=True))


def test_captions_say_what_is_shown() -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(300):
        world = draw_world(rng, 96, 160)
        text = caption(rng, world)
        for actor in world.actors:
            assert actor.thing in text and actor.colour in text
        assert any(phrase in text for phrase in MOTIONS[world.actors[0].motion].phrases)
        assert any(phrase in text for phrase in (*scenes.SCENES[world.scene].phrases, world.scene))
        if world.camera != "still":
            assert f"camera motion: {world.camera}." in text or CAMERA[world.camera] in text
        if "motion score:" in text:
            assert f"motion score: {motion_score(world):.1f}." in text
        assert not any(wrong in text for wrong in ("a orange", "a apple", "a umbrella"))


def test_faster_things_go_farther() -> None:
    rng, travelled = np.random.default_rng(SEED), {True: [], False: []}
    for _ in range(600):
        world = draw_world(rng, 128, 128)
        if any(world.actors[0].travel):
            travelled[motion_score(world) > 5].append(np.abs(world.actors[0].travel).max())
    assert np.mean(travelled[True]) > 1.25 * np.mean(travelled[False])


def test_labels_are_those_of_the_world() -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(100):
        text, told = draw_caption(rng, plain=True)
        values = {name: ATTRIBUTES[name][index] for name, index in zip(ATTRIBUTES, told, strict=True)}
        assert values["thing"] in text and values["colour"] in text
        assert (values["relation"] == NONE) == (values["second thing"] == NONE)
        assert (values["speed"] == NONE) or "motion score:" in text
    assert list(labels(draw_world(rng, 128, 128))) == list(ATTRIBUTES)


def test_continued_clips_go_on_without_a_jump() -> None:
    for index in range(count(12, 100)):
        clip = make_continued_clip(SEED, index, 34, 48, 64)
        change = np.abs(np.diff(clip.video.astype(float), axis=0)).mean((1, 2, 3))
        assert change[16] <= 3 * max(change.max() if clip.world.camera != "still" else np.sort(change)[-8], 0.5)
    again = make_continued_clip(SEED, 3, 34, 48, 64)
    assert np.array_equal(again.video, make_continued_clip(SEED, 3, 34, 48, 64).video)


def test_the_second_half_shows_what_the_caption_says() -> None:
    right = []
    for index in range(count(2, 60)):
        clip = make_continued_clip(SEED, index, 34, 96, 96)
        if clip.world.camera == "still" and len(clip.world.actors) == 1:
            verdict = assess(clip.world, clip.video[17:])
            right.append(verdict.right["thing"] and verdict.right["scene"])
    assert np.mean(right) > 0.7


def test_two_things_are_both_looked_for() -> None:
    two = next(c for n in range(99) if len((c := make_clip(SEED, n, 9, 96, 96)).world.actors) == 2)
    verdict = assess(two.world, two.video)
    assert "second thing" in verdict.right and verdict.flaws is None
    other = two.world.actors[1]
    alone = render(two.world._replace(actors=two.world.actors[:1]), 9, 96, 96)
    verdict = assess(two.world, alone)
    assert verdict.seen["second thing"] != other.thing and not verdict.right[ALL]


def test_windows_lie_in_their_clips() -> None:
    whole, window = clips().sets[0], clips(crop=(16, 24)).sets[0]
    for index in range(4):
        video, part = whole.window(index), window.window(index)
        found = [
            np.array_equal(video[:, y : y + 16, x : x + 24], part) for y in range(17) for x in range(25)
        ]  # fmt: skip
        assert part.shape == (3, 16, 24, 3) and any(found)
    with pytest.raises(ConfigError, match=r"dataset\.crop \(64, 24\) is larger than the clips"):
        clips(crop=(64, 24))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_rendered_ahead_is_what_is_rendered(num_workers: int) -> None:
    data = clips()
    ahead = VideosAhead(data, num_workers, torch.device("cpu"))
    for step in (4, 4, 5, 9, 2):
        assert torch.equal(ahead(step), data.videos(step))


def test_workers_keep_the_order() -> None:
    assert list(islice(map_ahead(float, iter(range(9)), 2), 5)) == [0.0, 1.0, 2.0, 3.0, 4.0]
