"""Captions of the world with labels, roughened as users write: the training data of a text encoder."""

from __future__ import annotations

import re

import numpy as np

from opensora.datasets.synthetic.labelled_captions import PLAIN_WORDS, roughen
from opensora.datasets.synthetic.world.captions import FASTEST, caption, has_speed, motion_score
from opensora.datasets.synthetic.world.motions import CAMERA, MOTIONS, STILL
from opensora.datasets.synthetic.world.palette import COLOURS
from opensora.datasets.synthetic.world.render import World, draw_world
from opensora.datasets.synthetic.world.scenes import SCENES
from opensora.datasets.synthetic.world.things import THINGS

NONE = "none"
SPEEDS = (NONE, "slow", "middle", "fast")
ATTRIBUTES = {
    "thing": tuple(THINGS), "colour": tuple(COLOURS), "motion": tuple(MOTIONS), "scene": tuple(SCENES),
    "camera": tuple(CAMERA), "second thing": (NONE, *THINGS), "second colour": (NONE, *COLOURS),
    "relation": (NONE, "behind", "in front of"), "speed": SPEEDS,
}  # fmt: skip
# A prompt that leaves something out means this.
DEFAULTS = {"colour": "red", "motion": STILL, "scene": "black"}
SHORT_PHRASINGS = (
    "a {colour} {thing} {motion}",
    "the {thing} is {motion} and it is {colour}",
    "a {colour} {thing} {scene}",
    "a {thing} {motion} {scene}",
    "{colour} {thing}, {scene}",
    "a {colour} {thing}",
    "{thing} {motion}",
)
SYNONYMS = {"circle": ("disc",), "square": ("box", "block"), "gray": ("grey",), "purple": ("violet",)}
VOCABULARY = {
    word
    for phrases in (
        *(motion.phrases for motion in MOTIONS.values()), *(scene.phrases for scene in SCENES.values()),
        CAMERA.values(), THINGS, COLOURS, SCENES, ("behind in front motion score camera static slow fast",),
    )
    for phrase in phrases
    for word in re.findall("[a-z]+", phrase)
}  # fmt: skip
NOISE_WORDS = sorted({*PLAIN_WORDS.split()} - VOCABULARY - {"no", "up", "down", "round", "ground", "water", "under"})


def draw_caption(rng: np.random.Generator, held_out: bool = False, plain: bool = False) -> tuple[str, tuple[int, ...]]:
    """A caption and the index of each of its attributes; `plain` gives it just as the clips have it."""
    world = draw_world(rng, 128, 128, held_out)
    text, values = caption(rng, world).lower(), labels(world)
    if "motion score:" not in text:
        values["speed"] = NONE
    if not plain and rng.random() < 0.15:
        text, values = _short(rng, values)
    text = text if plain else roughen(text, rng, SYNONYMS, NOISE_WORDS)
    return text, tuple(ATTRIBUTES[name].index(value) for name, value in values.items())


def labels(world: World) -> dict[str, str]:
    """The name of each attribute of a world."""
    subject, others = world.actors[0], world.actors[1:]
    values = {"thing": subject.thing, "colour": subject.colour, "motion": subject.motion, "scene": world.scene}
    values |= {"camera": world.camera, "second thing": NONE, "second colour": NONE, "relation": NONE}
    for other in others:
        values |= {"second thing": other.thing, "second colour": other.colour}
        values["relation"] = "behind" if world.behind else "in front of"
    level = min(int(3 * motion_score(world) / FASTEST), 2) + 1 if has_speed(world) else 0
    return values | {"speed": SPEEDS[level]}


def _short(rng: np.random.Generator, values: dict[str, str]) -> tuple[str, dict[str, str]]:
    """A caption that leaves something out, of one thing before a camera that stands still."""
    phrasing = str(rng.choice(SHORT_PHRASINGS))
    values = values | {"camera": ATTRIBUTES["camera"][0]}
    values |= dict.fromkeys(("second thing", "second colour", "relation", "speed"), NONE)
    values |= {name: value for name, value in DEFAULTS.items() if f"{{{name}}}" not in phrasing}
    words = {"motion": str(rng.choice(MOTIONS[values["motion"]].phrases))}
    words["scene"] = str(rng.choice(SCENES[values["scene"]].phrases))
    return phrasing.format(thing=values["thing"], colour=values["colour"], **words), values
