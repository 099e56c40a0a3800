"""Camera words and motion scores on rendered moves of a camera."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from opensora.curation.clip import Clip
from opensora.curation.stages.camera import Camera
from opensora.curation.stages.motion import Motion
from opensora.datasets.video import write_image, write_video
from opensora.errors import MediaError
from tests.curation.footage import HEIGHT, WIDTH, texture
from tests.full import some

SEEDS = range(20 if os.environ.get("OPENSORA_FULL") else 2)
# word -> (right, down in widths a second, growth a second, degrees a second) of the camera
MOVES = {
    "static": (0, 0, 0, 0), "pan left": (-0.15, 0, 0, 0), "pan right": (0.15, 0, 0, 0), "tilt up": (0, -0.15, 0, 0),
    "tilt down": (0, 0.15, 0, 0), "zoom in": (0, 0, 0.15, 0), "zoom out": (0, 0, -0.15, 0), "roll left": (0, 0, 0, -15),
    "roll right": (0, 0, 0, 15), "pan left+tilt up": (-0.1, -0.1, 0, 0), "pan right+zoom in": (0.1, 0, 0.2, 0),
}  # fmt: skip


def filmed(move: tuple[float, float, float, float], seed: int, fps: float = 24, seconds: float = 1.5) -> np.ndarray:
    """A textured plane seen by a moving camera: [T, H, W, 3] uint8."""
    random = np.random.default_rng(seed)
    plane = texture(seed, 3 * HEIGHT, 3 * WIDTH)
    plane = np.clip(plane + random.integers(-15, 15, plane.shape), 0, 255).astype(np.uint8)
    plane = cv2.GaussianBlur(plane, (0, 0), 1.2)
    right, down, growth, roll = move
    frames = []
    for time in np.arange(round(seconds * fps)) / fps:
        scale, angle = 1 / (1 + growth * time), np.radians(roll * time)
        cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
        x, y = 1.5 * WIDTH + right * WIDTH * time, 1.5 * HEIGHT + down * WIDTH * time
        matrix = np.array([
            [cos, -sin, x - cos * WIDTH / 2 + sin * HEIGHT / 2], [sin, cos, y - sin * WIDTH / 2 - cos * HEIGHT / 2],
        ])  # fmt: skip
        frames.append(cv2.warpAffine(plane, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP))
    return np.stack(frames)


@pytest.mark.parametrize("word", MOVES)
@some(6)
def test_words_of_camera_moves(word: str, tmp_path: Path) -> None:
    found = []
    for seed in SEEDS:
        path = write_video(filmed(MOVES[word], seed), tmp_path / f"{seed}.mp4", 24)
        found.append(Camera().process(Clip(str(path)))["cmotion"])
    assert found.count(word) >= 0.95 * len(found), found


def test_motion_scores_do_not_depend_on_the_frame_rate(tmp_path: Path) -> None:
    scores = [
        Motion().process(Clip(str(write_video(filmed((0.2, 0, 0, 0), 3, fps), tmp_path / f"{fps}.mp4", fps))))["flow"]
        for fps in (12, 24, 60)
    ]
    expected = 0.2 * 576 / 3 / 2  # pixels in a third of a second, averaged over both directions
    assert scores == pytest.approx([expected] * 3, rel=0.1)


def test_motion_scores_follow_the_speed(tmp_path: Path) -> None:
    speeds = (0, 0.02, 0.05, 0.1, 0.2, 0.3)
    scores = [
        Motion().process(Clip(str(write_video(filmed((speed, 0, 0, 0), 4), tmp_path / f"{speed}.mp4", 24))))["flow"]
        for speed in speeds
    ]
    assert scores == sorted(scores) and scores[0] < 0.1


@pytest.mark.parametrize("stage", [Camera(), Motion()])
def test_stills_have_no_motion(stage: Camera | Motion, tmp_path: Path) -> None:
    path = write_image(np.zeros((16, 16, 3), np.uint8), tmp_path / "still.png")
    with pytest.raises(MediaError, match=r"still.png"):
        stage.process(Clip(str(path)))
