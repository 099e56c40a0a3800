"""The pictures that scripts/misc/eval_embedded.py draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from opensora.datasets.synthetic.render import make_clip, render
from scripts.misc import eval_embedded
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
