"""The clips that the evaluations in scripts/misc measure, and the pictures that eval_embedded.py draws."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from opensora.datasets.synthetic.render import make_clip, render
from opensora.pipeline.recipe import read_recipe
from scripts.misc import eval_embedded, eval_world
from scripts.misc.eval_embedded import ENLARGED, FPS, NUM_FRAMES, SIDE


def test_the_animation_plays_the_first_examples(tmp_path: Path) -> None:
    assert eval_embedded.main(["--num-prompts", "4", "--from-scenes", "--save-dir", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "evaluation.json").read_text())["clips"]) == 4
    with Image.open(tmp_path / "evaluation.webp") as animation:
        assert animation.n_frames == NUM_FRAMES
        frames = []
        for number in range(NUM_FRAMES):
            animation.seek(number)
            frames.append(np.asarray(animation.convert("RGB")))
            assert animation.info["duration"] == round(1000 / FPS)
    scene = make_clip(2024, 0, 1, SIDE, SIDE).scene
    wanted = render(scene, NUM_FRAMES, SIDE, SIDE).repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2)
    shown = np.stack(frames)[:, 4 : 4 + wanted.shape[1], 4 : 4 + wanted.shape[2]]
    assert np.abs(shown.astype(float) - wanted).mean() < 8  # lossy twice


@pytest.mark.parametrize("evaluation", [eval_embedded, eval_world], ids=["shapes", "world"])
def test_a_folder_of_another_run_is_measured_anew(tmp_path: Path, evaluation: ModuleType) -> None:
    for seed in (1, 2):
        given = ["--num-prompts", "2", "--seed", str(seed), "--num-sampling-steps", "1", "--save-dir", str(tmp_path)]
        assert evaluation.main(given) == 0
    prompts = [read_recipe(path)["prompt"] for path in sorted(tmp_path.glob("*.mp4"))]
    assert prompts == [evaluation.make_clip(2, i, 1, SIDE, SIDE, held_out=i % 2 == 1).text for i in range(2)]
