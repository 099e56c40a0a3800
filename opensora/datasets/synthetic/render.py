"""Renders clips of moving shapes with captions from a seed: the training data of the embedded model.

A clip is a function of (seed, index), so nothing is stored or downloaded. One in ten (shape, color, motion)
combinations is held out of training, to measure compositional generalization.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from opensora.errors import ConfigError

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (230, 30, 30), "green": (40, 190, 60), "blue": (50, 90, 250), "yellow": (250, 235, 60),
    "purple": (165, 40, 200), "orange": (250, 140, 20), "white": (245, 245, 245), "cyan": (60, 220, 230),
}  # fmt: skip
BACKGROUNDS = {"black": (0, 0, 0), "gray": (64, 64, 64), "dark blue": (10, 15, 85), "dark green": (10, 65, 20)}
SMALLEST = 8.5  # least radius of an object, in pixels of a frame whose short side has 64
# motion -> (phrases, direction of travel (x, y), growth: +1 grows, -1 shrinks)
MOTIONS = {
    "moving left": (("moving left", "moves left", "sliding to the left", "going left"), (-1, 0), 0),
    "moving right": (("moving right", "moves right", "sliding to the right", "going right"), (1, 0), 0),
    "moving up": (("moving up", "moves up", "rising", "going up"), (0, -1), 0),
    "moving down": (("moving down", "moves down", "falling", "going down"), (0, 1), 0),
    "growing": (("growing", "grows", "getting bigger", "expanding"), (0, 0), 1),
    "shrinking": (("shrinking", "shrinks", "getting smaller", "contracting"), (0, 0), -1),
    "standing still": (("standing still", "stands still", "not moving", "resting"), (0, 0), 0),
}
CANONICAL = "a {colour} {shape} {motion} on a {background} background"
PHRASINGS = (
    CANONICAL,
    "{colour} {shape} {motion}, {background} background",
    "a video of a {colour} {shape} {motion} against a {background} background",
    "on a {background} background, a {colour} {shape} {motion}",
    "one {shape}, {colour}, {motion}, in front of a {background} background",
    "the background is {background} and a {colour} {shape} {motion}",
)
# What the embedded model does not know, for adapters to learn (docs/lora.md). There is no new colour: its autoencoder
# restores the eight above and no other.
NEW_SHAPES = ("bar",)
NEW_MOTIONS = {"moving diagonally": (("moving diagonally",), (1, 1), 0)}
ALL_MOTIONS = MOTIONS | NEW_MOTIONS
# 3, 8 and 7 have no common factor, so n -> (n % 3, n % 8, n % 7) meets each of the 168 combinations once; the first
# tenth is held out, and every shape, colour and motion stays well covered in training.
HELD_OUT = sorted((SHAPES[n % 3], tuple(COLOURS)[n % 8], tuple(MOTIONS)[n % 7]) for n in range(17))
TRAINED = [combination for combination in product(SHAPES, COLOURS, MOTIONS) if combination not in HELD_OUT]


class Scene(NamedTuple):
    """The scene of a clip: names as in the tables above, sizes in pixels."""

    shape: str
    colour: str
    motion: str
    background: str
    radius: float  # at the first frame
    end_radius: float
    start: tuple[float, float]  # centre (x, y) at the first frame
    travel: tuple[float, float]  # from the first to the last frame


def caption(scene: Scene, phrasing: str, motion_phrase: str) -> str:
    """The caption of a scene."""
    return phrasing.format(**scene._replace(motion=motion_phrase)._asdict()).replace("a orange", "an orange")


def draw_scene(rng: np.random.Generator, height: int, width: int, held_out: bool = False) -> Scene:
    """A random scene whose object stays inside the frame, from the training or the held-out combinations."""
    combinations = HELD_OUT if held_out else TRAINED
    shape, colour, motion = combinations[rng.integers(len(combinations))]
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return _place(rng, (shape, colour, motion, background), height, width)


def draw_new_scene(rng: np.random.Generator, index: int, new: Sequence[str], height: int, width: int) -> Scene:
    """Scene `index` of something new, at a random place: a shape, a motion, or one of each.

    The rest of it counts through all combinations, each of them once before one is repeated, so that a few clips show
    every name about equally often. Raises ConfigError for a name that is not new.
    """
    for name in new:
        if name not in (*NEW_SHAPES, *NEW_MOTIONS):
            known = ", ".join((*NEW_SHAPES, *NEW_MOTIONS))
            raise ConfigError(f"{name[:80]!r} is nothing new; choose one of {known}")
    shapes = [name for name in new if name in NEW_SHAPES] or SHAPES
    motions = [name for name in new if name in NEW_MOTIONS] or tuple(MOTIONS)
    colours, backgrounds = tuple(COLOURS), tuple(BACKGROUNDS)
    shape, motion = shapes[index % len(shapes)], motions[index % len(motions)]
    colour = colours[index % len(colours)]
    background = backgrounds[(index // len(colours) + index) % len(backgrounds)]
    return _place(rng, (shape, colour, motion, background), height, width)


def _place(rng: np.random.Generator, names: tuple[str, str, str, str], height: int, width: int) -> Scene:
    """The scene of a shape, colour, motion and background at a random place and size."""
    _, direction, growth = ALL_MOTIONS[names[2]]
    unit = min(height, width) / 64
    small, large = rng.uniform(SMALLEST, 10.5) * unit, rng.uniform(16.5, 20.5) * unit
    steady = rng.uniform(10.5, 14) * unit
    radius, end_radius = {0: (steady, steady), 1: (small, large), -1: (large, small)}[growth]
    size = np.array([width, height], dtype=float)
    room = np.maximum(size - 2 * (max(radius, end_radius) + unit), 0)  # range of the centre
    travel = np.array(direction) * room * rng.uniform(0.65, 1.0)
    low = (size - room) / 2 + np.maximum(-travel, 0)
    high = (size + room) / 2 - np.maximum(travel, 0)
    start = rng.uniform(low, high)
    return Scene(*names, radius, end_radius, (start[0], start[1]), (travel[0], travel[1]))


def alter_scene(rng: np.random.Generator, scene: Scene) -> Scene:
    """`scene` with another color, another shape or both, where and as it is; a combination that training may show.

    Nine times in ten the color changes, to similar ones most often (inversely to their squared RGB distance), and in
    one of five scenes the shape does.
    """
    others = {
        kind: [(s, c) for s, c, motion in TRAINED if motion == scene.motion and _kind_of_change(scene, s, c) == kind]
        for kind in ("colour", "shape", "both")
    }
    pairs = others[("colour", "shape", "both")[rng.choice(3, p=(0.8, 0.1, 0.1))]]
    distance = [np.square(np.subtract(COLOURS[scene.colour], COLOURS[colour])).sum() for _, colour in pairs]
    weight = 1 / np.maximum(distance, 1)
    shape, colour = pairs[rng.choice(len(pairs), p=weight / weight.sum())]
    return scene._replace(shape=shape, colour=colour)


def _kind_of_change(scene: Scene, shape: str, colour: str) -> str | None:
    """Which of `alter_scene`'s changes leads from `scene` to this shape and colour."""
    if colour == scene.colour:
        return None if shape == scene.shape else "shape"
    return "colour" if shape == scene.shape else "both"


def continue_scene(rng: np.random.Generator, scene: Scene, height: int, width: int, held_out: bool = False) -> Scene:
    """The next motion of the object of `scene`, starting where it ends, at half speed.

    It stays inside the frame, so an object at an edge may have to stand still.
    """
    unit = min(height, width) / 64
    combinations = HELD_OUT if held_out else TRAINED
    motions = [motion for shape, colour, motion in combinations if (shape, colour) == (scene.shape, scene.colour)]
    motion = motions[rng.integers(len(motions))] if motions else "standing still"
    _, direction, growth = MOTIONS[motion]
    size, centre = np.array([width, height], dtype=float), np.array(scene.start) + scene.travel
    room = np.minimum(centre, size - centre) - unit  # distance to the nearest edges
    radius = scene.end_radius + growth * rng.uniform(4.5, 6.5) * unit
    radius = max(min(radius, max(room.min(), scene.end_radius)), min(SMALLEST * unit, scene.end_radius))
    low, high = scene.end_radius + unit, size - scene.end_radius - unit
    travel = np.array(direction) * (high - low) * rng.uniform(0.65, 1.0) / 2
    travel = np.clip(centre + travel, np.minimum(low, centre), np.maximum(high, centre)) - centre
    start = (centre[0], centre[1])
    return scene._replace(
        motion=motion, radius=scene.end_radius, end_radius=radius, start=start, travel=(travel[0], travel[1])
    )


def render(scene: Scene, num_frames: int, height: int, width: int) -> np.ndarray:
    """The clip as uint8 [T, H, W, 3], edges anti-aliased over one pixel."""
    progress = np.linspace(0, 1, num_frames)[:, None, None]
    return _render(scene, progress, height, width)


def _render(scene: Scene, progress: np.ndarray, height: int, width: int) -> np.ndarray:
    """The frames at `progress` [T, 1, 1], 0 where the scene starts and 1 where it ends."""
    x = np.arange(width) + 0.5 - (scene.start[0] + progress * scene.travel[0])
    y = np.arange(height)[:, None] + 0.5 - (scene.start[1] + progress * scene.travel[1])
    radius = scene.radius + progress * (scene.end_radius - scene.radius)
    coverage = np.clip(0.5 - signed_distance(scene.shape, x, y, radius), 0, 1)[..., None]
    colour, background = np.array(COLOURS[scene.colour]), np.array(BACKGROUNDS[scene.background])
    return np.round(background + coverage * (colour - background)).astype(np.uint8)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance in pixels to the outline (negative inside) of a shape that fits in `radius`."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * radius
    if shape == "bar":
        return np.maximum(np.abs(x) - 0.5 * radius, np.abs(y) - radius)
    half = np.sqrt(3) / 2  # equilateral, apex up, its centroid slightly below the centre so that it fills the disc
    inner = 0.58 * radius
    return np.maximum(y - inner, half * np.abs(x) - 0.5 * y - inner)


class Clip(NamedTuple):
    """A rendered clip: `video` uint8 [T, H, W, 3], its caption and the scene behind it."""

    video: np.ndarray
    text: str
    scene: Scene


def make_clip(seed: int, index: int, num_frames: int, height: int, width: int, held_out: bool = False) -> Clip:
    """Clip `index` of the unlimited set `seed`; `held_out` uses only the combinations held out of training."""
    rng = np.random.default_rng((seed, index, int(held_out)))
    scene = draw_scene(rng, height, width, held_out)
    return Clip(render(scene, num_frames, height, width), _describe(rng, scene), scene)


def make_altered_clip(seed: int, index: int, num_frames: int, height: int, width: int) -> np.ndarray:
    """Clip `index` of the set `seed` as `alter_scene` alters it, uint8 [T, H, W, 3]; it contradicts its caption."""
    scene = draw_scene(np.random.default_rng((seed, index, 0)), height, width)
    return render(alter_scene(np.random.default_rng((seed, index, 4)), scene), num_frames, height, width)


def make_new_clip(seed: int, index: int, new: Sequence[str], num_frames: int, height: int, width: int) -> Clip:
    """Clip `index` of the set `seed` of clips that show something new; see `draw_new_scene`."""
    rng = np.random.default_rng((seed, index, 3))
    scene = draw_new_scene(rng, index, new, height, width)
    return Clip(render(scene, num_frames, height, width), _describe(rng, scene), scene)


def make_continued_clip(
    seed: int, index: int, num_frames: int, height: int, width: int, held_out: bool = False
) -> Clip:
    """Clip `index` of a set of continued clips: scene and caption are those of the second half.

    In the first half the object moves as in a clip of that length or of twice the length; then it keeps its motion
    (half of the clips) or changes to another one.
    """
    rng = np.random.default_rng((seed, index, int(held_out), 2))
    half = num_frames // 2
    scene = draw_scene(rng, height, width, held_out)
    kind = rng.integers(4)
    if kind < 2:
        return Clip(render(scene, num_frames, height, width), _describe(rng, scene), scene)
    last = half - 1 if kind == 2 else int(rng.integers(half - 1, num_frames))
    steps = half - 1 if kind == 2 else num_frames - 1
    progress = np.arange(last - half + 1, last + 1)[:, None, None] / steps
    before = _render(scene, progress, height, width)
    end = progress.max()
    seen = scene._replace(
        travel=(scene.travel[0] * end, scene.travel[1] * end),
        end_radius=scene.radius + end * (scene.end_radius - scene.radius),
    )
    after = continue_scene(rng, seen, height, width, held_out)
    progress = np.arange(1, num_frames - half + 1)[:, None, None] / (num_frames - half)
    return Clip(np.concatenate([before, _render(after, progress, height, width)]), _describe(rng, after), after)


def _describe(rng: np.random.Generator, scene: Scene) -> str:
    """A caption in one of many phrasings, often the canonical one."""
    phrasing = PHRASINGS[rng.integers(len(PHRASINGS))] if rng.random() > 0.3 else CANONICAL
    phrases = ALL_MOTIONS[scene.motion][0]
    phrase = phrases[rng.integers(len(phrases))] if rng.random() > 0.4 else scene.motion
    return caption(scene, phrasing, phrase)
