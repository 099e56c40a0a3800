"""Captions of the world in many phrasings, with the conditioning words of Open-Sora 1.2."""

from __future__ import annotations

import re

import numpy as np

from opensora.datasets.captions import append_score
from opensora.datasets.synthetic.render import PHRASINGS
from opensora.datasets.synthetic.world.motions import CAMERA, MOTIONS, STILL_CAMERA
from opensora.datasets.synthetic.world.render import World
from opensora.datasets.synthetic.world.scenes import PLAIN, SCENES

FASTEST = 10.0  # motion score of a thing that goes as far as it can
STATIC = "static"  # Open-Sora's word for a camera that stands still


def has_speed(world: World) -> bool:
    """Whether the subject travels or grows, so that it may do so slowly or fast."""
    motion = MOTIONS[world.actors[0].motion]
    return motion.travel != (0, 0) or motion.growth != 0


def motion_score(world: World) -> float:
    """0 for the slowest subject, FASTEST for the fastest."""
    return float(round(FASTEST * (2 * world.speed - 1)))


def caption(rng: np.random.Generator, world: World) -> str:
    """A random phrasing; a quarter of them name the motion score, half of them the camera."""
    subject = world.actors[0]
    motion = subject.motion if rng.random() < 0.4 else str(rng.choice(MOTIONS[subject.motion].phrases))
    if world.scene in PLAIN and len(world.actors) == 1 and rng.random() < 0.5:
        text = str(rng.choice(PHRASINGS)).format(
            colour=subject.colour, shape=subject.thing, motion=motion, background=world.scene
        )
    else:
        text = _sentence(rng, world, motion)
    text = re.sub(r"\ba (?=orange|apple|umbrella)", "an ", text)
    return _conditioned(rng, world, text)


def _sentence(rng: np.random.Generator, world: World, motion: str) -> str:
    subject, place = world.actors[0], str(rng.choice(SCENES[world.scene].phrases))
    text = f"a {subject.colour} {subject.thing} {motion}"
    if len(world.actors) > 1:
        other = world.actors[1]
        text += f" {'behind' if world.behind else 'in front of'} a {other.colour} {other.thing}"
    return f"{text} {place}" if rng.random() < 0.7 else f"{place}, {text}"


def _conditioned(rng: np.random.Generator, world: World, text: str) -> str:
    """The caption with words about camera and speed."""
    score = motion_score(world) if has_speed(world) and rng.random() < 0.25 else None
    named = rng.random() < 0.5  # the camera, in Open-Sora's words
    if world.camera == STILL_CAMERA:
        return append_score(text, flow=score, camera_motion=STATIC if named and rng.random() < 0.3 else None)
    if named:
        return append_score(text, flow=score, camera_motion=world.camera)
    return append_score(f"{text}, {CAMERA[world.camera]}", flow=score)
