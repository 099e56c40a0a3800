"""How things and the camera move. Time runs from 0 to 1 over a clip; lengths are in short sides of the frame."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Motion(NamedTuple):
    """Phrases of a motion, its travel (x, y), growth (+1 or -1), and its kind: straight, turn, bounce or swing."""

    phrases: tuple[str, ...]
    travel: tuple[int, int] = (0, 0)
    growth: int = 0
    kind: str = "straight"


STILL = "standing still"
MOTIONS = {
    "moving left": Motion(("moving left", "moves left", "going left", "sliding to the left"), (-1, 0)),
    "moving right": Motion(("moving right", "moves right", "going right", "sliding to the right"), (1, 0)),
    "moving up": Motion(("moving up", "moves up", "rising", "going up"), (0, -1)),
    "moving down": Motion(("moving down", "moves down", "falling", "going down"), (0, 1)),
    "moving up and right": Motion(("moving up and right", "rising to the right", "going up to the right"), (1, -1)),
    "moving up and left": Motion(("moving up and left", "rising to the left", "going up to the left"), (-1, -1)),
    "moving down and right": Motion(
        ("moving down and right", "falling to the right", "going down to the right"), (1, 1)
    ),
    "moving down and left": Motion(("moving down and left", "falling to the left", "going down to the left"), (-1, 1)),
    "growing": Motion(("growing", "grows", "getting bigger", "expanding"), growth=1),
    "shrinking": Motion(("shrinking", "shrinks", "getting smaller", "contracting"), growth=-1),
    "turning": Motion(("turning", "turns", "spinning", "rotating"), kind="turn"),
    "bouncing": Motion(("bouncing", "bounces", "jumping up and down", "hopping"), kind="bounce"),
    "swinging": Motion(("swinging", "swings", "rocking", "swaying"), kind="swing"),
    STILL: Motion(("standing still", "stands still", "not moving", "resting")),
}

STILL_CAMERA = "still"
CAMERA = {  # how captions tell of it
    STILL_CAMERA: "the camera stands still", "pan left": "the camera pans left", "pan right": "the camera pans right",
    "zoom in": "the camera zooms in", "zoom out": "the camera zooms out",
}  # fmt: skip
PAN, ZOOM = 0.5, 1.45  # short sides of travel, and ratio of sizes, over 17 frames
HOP = 0.22  # height of a bounce


class Path(NamedTuple):
    """Where a thing is in each frame: centre x, y and radius in short sides, angle in radians; all [T]."""

    x: Array
    y: Array
    radius: Array
    angle: Array


def path(
    kind: str,
    progress: Array,
    frames: float,
    start: tuple[float, float],
    travel: tuple[float, float],
    radii: tuple[float, float],
) -> Path:
    """The path of a thing; `frames` is the length of the clip in frames, so that turns and bounces keep their pace."""
    x, y = start[0] + progress * travel[0], start[1] + progress * travel[1]
    radius = radii[0] * (radii[1] / radii[0]) ** progress
    angle = np.zeros_like(progress)
    pace = progress * frames / 17
    if kind == "turn":
        angle = np.pi * pace
    elif kind == "bounce":
        y = y - HOP * np.abs(np.sin(2 * np.pi * pace))
    elif kind == "swing":
        angle = 0.5 * np.sin(2 * np.pi * pace)
    return Path(x, y, radius, angle)


def view(camera: str, progress: Array, frames: float) -> tuple[Array, Array]:
    """The camera's x position and zoom in each frame, [T]; the clip's middle is at 0 and 1."""
    pace = (progress - 0.5) * frames / 17
    x, zoom = np.zeros_like(progress), np.ones_like(progress)
    if camera.startswith("pan"):
        x = PAN * pace * (1 if camera == "pan right" else -1)
    elif camera.startswith("zoom"):
        zoom = ZOOM ** (pace * (1 if camera == "zoom in" else -1))
    return x, zoom
