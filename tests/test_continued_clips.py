"""Clips that go on after their first half: one object, never out of the frame, its caption about the second half."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opensora.datasets.synthetic.dataset import rendered_clips
from opensora.datasets.synthetic.measure import measure
from opensora.datasets.synthetic.render import MOTIONS, make_clip, make_continued_clip
from opensora.errors import ConfigError
from opensora.training.data.batch import TrainingBatch
from opensora.training.losses.diffusion import DiffusionLoss
from opensora.training.masks import MaskRatios
from tests.full import count

SIZES = ((64, 64), (48, 80), (80, 48))


def clips(number: int):
    return [(make_continued_clip(5, index, 34, *SIZES[index % 3]), SIZES[index % 3]) for index in range(number)]


def test_caption_and_scene_tell_the_second_half():
    right = []
    for clip, _ in clips(count(30, 90)):
        shown = measure(clip.video[17:])
        assert (shown.shape, shown.colour, shown.background) == (
            clip.scene.shape,
            clip.scene.colour,
            clip.scene.background,
        )
        assert clip.scene.colour in clip.text and clip.scene.shape in clip.text
        assert any(phrase in clip.text for phrase in MOTIONS[clip.scene.motion][0])
        right.append(shown.motion == clip.scene.motion)
    assert np.mean(right) > 0.8  # an object at the edge has no room for some motions and rests


def test_nothing_jumps_and_nothing_leaves():
    for clip, (height, width) in clips(count(30, 90)):
        change = np.abs(np.diff(clip.video.astype(float), axis=0)).mean((1, 2, 3))
        assert change[16] <= 1.5 * max(change[15], change[17], 0.1)
        end = np.array(clip.scene.start) + clip.scene.travel
        assert (np.minimum(end, (width, height) - end) >= clip.scene.end_radius).all()


def test_half_go_on_as_they_did_and_half_change():
    changed = [measure(clip.video[:17]).motion != clip.scene.motion for clip, _ in clips(count(40, 120))]
    assert 0.2 < np.mean(changed) < 0.6


def test_a_clip_is_a_function_of_its_number():
    again = make_continued_clip(5, 7, 34, 64, 64)
    assert np.array_equal(again.video, make_continued_clip(5, 7, 34, 64, 64).video)
    assert not np.array_equal(again.video, make_continued_clip(5, 8, 34, 64, 64).video)
    assert not np.array_equal(again.video, make_clip(5, 7, 34, 64, 64).video)


def test_listed_in_the_configuration():
    section = {"type": "ShapeClips", "sizes": [(17, 64, 64, 0.7)], "continued": [(34, 48, 80, 0.3)], "num_clips": 20}
    plain, continued = rendered_clips(section, 4, 0).sets
    assert (str(plain), str(continued)) == ("17x64x64", "34x48x80_continued")
    assert continued.batch_size == 2 and continued.seed != plain.seed
    assert continued.clip(3).video.shape == (34, 48, 80, 3)
    with pytest.raises(ConfigError, match=r"dataset\.sizes lists"):
        rendered_clips(section | {"continued": [(34, 48, 80)]}, 4, 0)


def test_training_gives_what_went_before():
    given = []

    class Scheduler:
        def training_loss(self, model, latents, cond, *, mask, **size):
            given.append(mask)
            return torch.zeros(len(latents))

    class Model(torch.nn.Module):
        class_dropout_prob = 0.0

    batch = TrainingBatch(torch.zeros(2, 4, 10, 2, 2), {"y": torch.zeros(2, 1, 3, 4)}, (34, 16, 16), ["a", "b"])
    ratios = MaskRatios({"identity": 1.0})
    loss = DiffusionLoss(Model(), Scheduler(), ratios)
    for continued in (False, True):
        loss(batch._replace(continued=continued), torch.Generator().manual_seed(0))
    assert given[0].all() and (given[1] == torch.tensor([False] * 5 + [True] * 5)).all()
