"""Captions of the moving shapes with labels, roughened as users write: the training data of a text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from opensora.datasets.synthetic import render

ATTRIBUTES = {
    "shape": render.SHAPES, "colour": tuple(render.COLOURS), "motion": tuple(render.MOTIONS),
    "background": tuple(render.BACKGROUNDS),
}  # fmt: skip
# A prompt that leaves something out means this.
DEFAULTS = {"colour": "white", "motion": "standing still", "background": "black"}
SHORT_PHRASINGS = (
    "a {colour} {shape} {motion}",
    "the {shape} is {motion} and it is {colour}",
    "a {colour} {shape} on a {background} background",
    "{colour} {shape}, {background} background",
    "a {shape} {motion} on a {background} background",
    "a {colour} {shape}",
    "{shape} {motion}",
)
SYNONYMS = {"circle": ("ball", "disc"), "square": ("box", "block"), "gray": ("grey",), "purple": ("violet",)}
FILLERS = {"a", "an", "the", "one", "of", "on", "in", "is", "and", "it", "video", "against", "front", "to"}
PLAIN_WORDS = """
about after again air all along animal another any are around as at away back bad be beautiful because before behind
best better between big bird boat body book both boy bright but by camera can car cat change child cinematic city clear
close cloud cold come could day deep detail different do dog door down each earth end even every eye face far fast few
field film fire first fish flower fly food for forest from full game girl give go good great ground group hand happy
has have he head her high hill his home horse hot house how into just kind lake land large last leaf left life light
like line little live long look made make man many me moon more morning most mountain move much music near new next
night no now ocean off old only or other our out over own paper park people person photo picture place plant play
point quiet rain really right river road rock room round run sand sea see shadow she shot side simple sky sleep slow
slowly small smooth snow so soft some song sound space star still stone storm street style summer sun sunset sweet
table tall than that their them then there they thing this time tiny top town toy train travel tree turn two under up
very view walk wall warm was water wave way we wide wild wind window winter with wood word world year you young
"""
# Words inserted as noise must not tell of an attribute themselves.
NOISE_WORDS = sorted({*PLAIN_WORDS.split()} - {"up", "down", "left", "right", "still", "round", "no"})


def draw_caption(rng: np.random.Generator, held_out: bool = False, plain: bool = False) -> tuple[str, tuple[int, ...]]:
    """A caption and the index of each of its attributes; `plain` gives it just as the clips have it."""
    scene = render.draw_scene(rng, 64, 64, held_out)
    values = {name: getattr(scene, name) for name in ATTRIBUTES}
    phrasing = render.PHRASINGS[rng.integers(len(render.PHRASINGS))]
    if not plain and rng.random() < 0.15:
        phrasing = SHORT_PHRASINGS[rng.integers(len(SHORT_PHRASINGS))]
        values |= {name: value for name, value in DEFAULTS.items() if f"{{{name}}}" not in phrasing}
    motions = render.MOTIONS[scene.motion][0]
    text = render.caption(scene, phrasing, motions[rng.integers(len(motions))]).lower()
    text = text if plain else roughen(text, rng, SYNONYMS, NOISE_WORDS)
    return text, tuple(ATTRIBUTES[name].index(value) for name, value in values.items())


def roughen(text: str, rng: np.random.Generator, synonyms: Mapping[str, Sequence[str]], noise: Sequence[str]) -> str:
    """The caption with some filler words dropped or replaced, words added, and synonyms: the meaning stays."""
    words = []
    for word in text.split():
        bare = word.rstrip(",")
        if bare in synonyms and rng.random() < 0.15:
            word = word.replace(bare, str(rng.choice(synonyms[bare])))
        if word not in FILLERS or rng.random() > 0.1:
            words.append(word)
        if word in FILLERS and rng.random() < 0.05:
            words.append(str(rng.choice(noise)))
    return " ".join(words) + ("." if rng.random() < 0.1 else "")
