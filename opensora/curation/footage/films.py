"""Films: shots of one subject with hard cuts, fades and dissolves between them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from opensora.curation.footage.pictures import draw_subject
from opensora.curation.footage.shots import Shot, draw_shot, render_shot

FPS = 24
SCENE_FRAMES = (30, 60)  # of a scene, without its transitions
TRANSITIONS = ("cut", "dissolve", "fade to black", "fade to white")
SHARES = (0.5, 0.2, 0.2, 0.1)
BLANK = {"fade to black": 0.0, "fade to white": 255.0}


class Transition(NamedTuple):
    """A change of scene. The frames [start, end) belong to neither scene; start is end for a hard cut."""

    kind: str
    start: int
    end: int


class Scene(NamedTuple):
    """The frames [start, end) of a film that show one shot, and the share of a frame that its text covers."""

    start: int
    end: int
    shot: Shot
    text_area: float


class Film(NamedTuple):
    """Frames uint8 [T, H, W, 3] and what they show; a transition lies between every two scenes."""

    frames: np.ndarray
    caption: str
    scenes: tuple[Scene, ...]
    transitions: tuple[Transition, ...]


def render_film(seed: int, index: int, num_scenes: int, height: int, width: int) -> Film:
    """Film `index` of the unlimited set `seed`."""
    rng = np.random.default_rng((seed, index))
    subject = draw_subject(rng)
    kinds = [str(kind) for kind in rng.choice(TRANSITIONS, num_scenes - 1, p=SHARES)]
    lengths = [0 if kind == "cut" else int(rng.integers(8, 21)) for kind in kinds]
    frames: list[np.ndarray] = []
    scenes, transitions, before = [], [], np.empty((0, height, width, 3), np.uint8)
    for number in range(num_scenes):
        lead = lengths[number - 1] if number else 0
        tail = lengths[number] if number < num_scenes - 1 else 0
        length = int(rng.integers(SCENE_FRAMES[0], SCENE_FRAMES[1] + 1))
        shot = draw_shot(rng, subject, lead + length + tail)
        rendered = render_shot(shot, height, width, FPS)
        if number:
            start = sum(map(len, frames))
            frames.append(join(kinds[number - 1], before, rendered.frames[:lead]))
            transitions.append(Transition(kinds[number - 1], start, start + len(frames[-1])))
        start = sum(map(len, frames))
        frames.append(rendered.frames[lead : lead + length])
        scenes.append(Scene(start, start + length, shot, rendered.text_area))
        before = rendered.frames[lead + length :]
    return Film(np.concatenate(frames), subject.caption, tuple(scenes), tuple(transitions))


def join(kind: str, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The frames of a transition from `before` to `after`, both [n, H, W, 3].

    n frames of a dissolve, 2 n of a fade: out to the blank frame, then in from it.
    """
    share = (np.arange(len(before)) + 1)[:, None, None, None] / (len(before) + 1)
    if kind in BLANK:
        out = before * (1 - share) + BLANK[kind] * share
        mixed = np.concatenate([out, BLANK[kind] * (1 - share) + after * share])
    else:
        mixed = before * (1 - share) + after * share
    return np.round(mixed).astype(np.uint8)
