"""Clips of the world with captions. A clip is a function of (seed, index)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from opensora.datasets.synthetic.world.captions import caption
from opensora.datasets.synthetic.world.motions import HOP, MOTIONS, STILL, STILL_CAMERA
from opensora.datasets.synthetic.world.render import (
    HELD_OUT,
    TRAINED,
    Actor,
    World,
    actor_path,
    draw_world,
    render,
    render_at,
)

Array = np.ndarray
LEAST_TRAVEL, LEAST_GROWTH = 0.15, 0.3  # short sides, and logarithm of the sizes' ratio: less room means standing still


class Clip(NamedTuple):
    """A rendered clip: `video` uint8 [T, H, W, 3], its caption and the world behind it."""

    video: Array
    text: str
    world: World


def make_clip(seed: int, index: int, num_frames: int, height: int, width: int, held_out: bool = False) -> Clip:
    """Clip `index` of the unlimited set `seed`; `held_out` uses only the combinations held out of training."""
    rng = np.random.default_rng((seed, index, int(held_out), 3))
    world = draw_world(rng, height, width, held_out)
    return Clip(render(world, num_frames, height, width), caption(rng, world), world)


def make_continued_clip(
    seed: int, index: int, num_frames: int, height: int, width: int, held_out: bool = False
) -> Clip:
    """Clip `index` of a set of continued clips: world and caption are those of the second half.

    In a part of the clips the subject keeps its motion; in the others it goes over to another one.
    """
    rng = np.random.default_rng((seed, index, int(held_out), 4))
    world = draw_world(rng, height, width, held_out)
    if world.camera != STILL_CAMERA or rng.random() < 0.4:
        return Clip(render(world, num_frames, height, width), caption(rng, world), world)
    half = num_frames // 2
    before = render(world, half, height, width)
    after = continue_world(rng, world, half, (height, width), held_out)
    steps = num_frames - half
    video = render_at(after, np.arange(1, steps + 1) / steps, steps, height, width)
    return Clip(np.concatenate([before, video]), caption(rng, after), after)


def continue_world(
    rng: np.random.Generator, world: World, num_frames: int, size: tuple[int, int], held_out: bool = False
) -> World:
    """The world after a clip of `num_frames`, its subject about to move otherwise; it stays inside the frame."""
    subject = world.actors[0]
    end = actor_path(subject, np.ones(1), num_frames)
    x, y, radius, angle = (float(values[0]) for values in end)
    combinations = HELD_OUT if held_out else TRAINED
    motions = [motion for thing, colour, motion in combinations if (thing, colour) == (subject.thing, subject.colour)]
    motion = str(rng.choice(motions)) if motions else STILL
    half = np.array([size[1], size[0]]) / min(size) / 2 - radius - 0.02  # of the range of the centre
    centre, speed = np.array([x, y]), float(rng.uniform(0.5, 1))
    move = MOTIONS[motion]
    target = np.clip(centre + np.array(move.travel) * speed * 0.5, np.minimum(-half, centre), np.maximum(half, centre))
    room = max(float((half - np.abs(centre)).min()), 0.0)
    grown = radius * 1.9 ** (speed * move.growth)
    grown = min(grown, max(radius, radius + room)) if move.growth > 0 else max(grown, 0.1)
    stuck = move.kind == "bounce" and y + half[1] < HOP
    stuck |= move.travel != (0, 0) and float(np.abs(target - centre).max()) < LEAST_TRAVEL
    stuck |= move.growth != 0 and abs(float(np.log(grown / radius))) < LEAST_GROWTH
    if stuck:
        motion, target, grown = STILL, centre, radius
    travel = (float(target[0] - x), float(target[1] - y))
    after = Actor(subject.thing, subject.colour, motion, (x, y), travel, (radius, grown), subject.mirrored, angle)
    return world._replace(actors=(after, *world.actors[1:]), speed=speed)
