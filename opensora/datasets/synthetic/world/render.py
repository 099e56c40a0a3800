"""Worlds with things, a scene and a camera, drawn at random and rendered."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np

from opensora.datasets.synthetic.world.motions import CAMERA, HOP, MOTIONS, STILL, STILL_CAMERA, Path, path, view
from opensora.datasets.synthetic.world.palette import COLOURS, NEAR_COLOUR
from opensora.datasets.synthetic.world.scenes import PICTURES, PLAIN, SCENES, Canvas
from opensora.datasets.synthetic.world.things import FACING, MAIN, PAINTS, SYMMETRY, THINGS

Array = np.ndarray


def _shows(thing: str, colour: str, motion: str) -> bool:
    """Whether the thing's parts can be told apart in this colour, and its motion be seen."""
    paints = [np.array(PAINTS[layer.paint]) for layer in THINGS[thing] if layer.paint != MAIN]
    if any(np.linalg.norm(paint - COLOURS[colour]) <= NEAR_COLOUR for paint in paints):
        return False
    return MOTIONS[motion].kind not in ("turn", "swing") or SYMMETRY.get(thing, 1) in range(1, 7)


COMBINATIONS = tuple(c for c in product(THINGS, COLOURS, MOTIONS) if _shows(*c))
_RANK = np.random.default_rng(0).permutation(len(COMBINATIONS))
HELD_OUT = tuple(c for c, rank in zip(COMBINATIONS, _RANK, strict=True) if rank % 10 == 0)  # never trained on
TRAINED = tuple(c for c, rank in zip(COMBINATIONS, _RANK, strict=True) if rank % 10)


APART = 0.85  # distance of two things from one another at first, at least, in sums of their radii


class Actor(NamedTuple):
    """A thing of a clip: name, colour and motion, and where it goes, in short sides of the frame."""

    thing: str
    colour: str
    motion: str
    start: tuple[float, float]
    travel: tuple[float, float]
    radii: tuple[float, float]  # at the first and the last frame
    mirrored: bool = False
    angle: float = 0.0  # at the first frame, in radians


class World(NamedTuple):
    """A clip before it is rendered: actors from back to front, scene, camera, and the seed of the scene's details."""

    actors: tuple[Actor, ...]
    scene: str
    camera: str
    details: int
    behind: bool = False  # whether the first actor, the subject, passes behind the second
    speed: float = 1.0  # how far the subject travels or grows: 0.5 to 1 of what the frame leaves it


def render(world: World, num_frames: int, height: int, width: int) -> Array:
    """The clip as uint8 [T, H, W, 3], edges anti-aliased over one pixel."""
    progress = np.linspace(0, 1, num_frames) if num_frames > 1 else np.full(1, 0.5)
    return render_at(world, progress, num_frames, height, width)


def render_at(world: World, progress: Array, num_frames: int, height: int, width: int) -> Array:
    """The frames at `progress` [T], 0 to 1 of a clip of `num_frames`, as uint8 [T, H, W, 3]."""
    side = min(height, width)
    camera_x, zoom = view(world.camera, progress, num_frames)
    scale = (side * zoom).astype(np.float32)[:, None, None]  # pixels per short side
    columns = np.arange(width, dtype=np.float32) + 0.5 - width / 2
    x = columns[None, None] / scale + camera_x.astype(np.float32)[:, None, None]
    y = (np.arange(height, dtype=np.float32) + 0.5 - height / 2)[None, :, None] / scale
    moving = slice(None) if world.camera != STILL_CAMERA else slice(1)  # a picture that stands still is drawn once
    canvas = Canvas(x[moving], y[moving], 1 / scale[moving])
    SCENES[world.scene].draw(canvas, np.random.default_rng(world.details))
    frames = np.broadcast_to(canvas.colour, (len(progress), height, width, 3)).copy()
    order = world.actors if world.behind else world.actors[::-1]
    for actor in order:
        _draw_actor(frames, actor, actor_path(actor, progress, num_frames), x, y, scale)
    return np.round(frames).clip(0, 255).astype(np.uint8)


def actor_path(actor: Actor, progress: Array, num_frames: int) -> Path:
    """The path of an actor over the frames of a clip."""
    way = path(MOTIONS[actor.motion].kind, progress, num_frames, actor.start, actor.travel, actor.radii)
    return way._replace(angle=way.angle + actor.angle)


def _draw_actor(frames: Array, actor: Actor, way: Path, x: Array, y: Array, scale: Array) -> None:
    for index in range(len(frames)):
        cx, cy, radius, angle = (float(values[index]) for values in way)
        pixels = float(scale[index, 0, 0])
        reach = 1.05 * radius + 1.5 / pixels
        columns, rows = np.abs(x[index, 0] - cx) <= reach, np.abs(y[index, :, 0] - cy) <= reach
        if not columns.any() or not rows.any():
            continue
        area = np.ix_(rows, columns)
        dx, dy = (x[index, 0][columns][None] - cx) / radius, (y[index, :, 0][rows][:, None] - cy) / radius
        cos, sin = np.cos(angle), np.sin(angle)
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        u = -u if actor.mirrored else u
        colour = frames[index][area]
        for layer in THINGS[actor.thing]:
            paint = COLOURS[actor.colour] if layer.paint == MAIN else PAINTS[layer.paint]
            coverage = np.clip(0.5 - layer.distance(u, v) * radius * pixels, 0, 1)[..., None]
            colour += coverage * (np.array(paint, np.float32) - colour)
        frames[index][area] = colour


def draw_world(rng: np.random.Generator, height: int, width: int, held_out: bool = False) -> World:
    """A random world from the training or the held-out combinations; its subject stays inside the frame."""
    combinations = HELD_OUT if held_out else TRAINED
    thing, colour, motion = combinations[rng.integers(len(combinations))]
    scenes = [name for name, scene in SCENES.items() if colour not in scene.hides]
    plain = [name for name in scenes if name in PLAIN]
    scene = str(rng.choice(plain if rng.random() < 0.3 else [name for name in scenes if name not in PLAIN]))
    camera = STILL_CAMERA
    if scene in PICTURES and MOTIONS[motion].travel == (0, 0) and not MOTIONS[motion].growth and rng.random() < 0.35:
        camera = str(rng.choice([name for name in CAMERA if name != STILL_CAMERA]))
    size = np.array([width, height]) / min(height, width)
    speed = float(rng.uniform(0.5, 1))
    subject = _place(rng, thing, colour, motion, size, camera, speed)
    actors: tuple[Actor, ...] = (subject,)
    behind = False
    if camera == STILL_CAMERA and rng.random() < 0.15:
        other = _companion(rng, subject, scene, size)
        behind = bool(rng.random() < 0.5)
        actors = (subject, other)
    return World(actors, scene, camera, int(rng.integers(2**31)), behind, speed)


def _place(
    rng: np.random.Generator, thing: str, colour: str, motion: str, size: Array, camera: str, speed: float
) -> Actor:
    """An actor whose path stays inside the frame of `size` (width, height), in short sides."""
    move = MOTIONS[motion]
    middle, growth, steady = rng.uniform(0.17, 0.2), rng.uniform(2.1, 2.5) ** (speed / 2), rng.uniform(0.17, 0.23)
    small, large = middle / growth, middle * growth
    radii = {0: (steady, steady), 1: (small, large), -1: (large, small)}[move.growth]
    margin = max(radii) + 0.02
    room = np.maximum(size - 2 * margin, 0)  # range of the centre
    if camera != STILL_CAMERA:
        room = room * 0.3
    travel = np.array(move.travel) * room * speed
    low, high = -room / 2 + np.maximum(-travel, 0), room / 2 - np.maximum(travel, 0)
    if move.kind == "bounce":
        low[1] = min(-room[1] / 2 + HOP, high[1])
    start = rng.uniform(low, np.maximum(high, low))
    left = travel[0] < 0 or (travel[0] == 0 and rng.random() < 0.5)
    mirrored = bool(thing in FACING and left)
    return Actor(thing, colour, motion, (start[0], start[1]), (travel[0], travel[1]), radii, mirrored)


def _companion(rng: np.random.Generator, subject: Actor, scene: str, size: Array) -> Actor:
    """A thing of another kind and colour that stands on the subject's way."""
    things = [thing for thing in THINGS if thing != subject.thing]
    colours = [colour for colour in COLOURS if colour != subject.colour and colour not in SCENES[scene].hides]
    pairs = [(thing, colour) for thing in things for colour in colours if _shows(thing, colour, STILL)]
    thing, colour = pairs[rng.integers(len(pairs))]
    radius = rng.uniform(0.16, 0.21)
    start, travel = np.array(subject.start), np.array(subject.travel)
    far = float(np.hypot(*travel))
    towards = travel / far if far else np.array([float(rng.choice([-1, 1])), 0.0])
    limit = size / 2 - radius - 0.02
    apart = max(APART * (radius + max(subject.radii)), far * rng.uniform(0.4, 0.65))
    places = [np.clip(start + sign * apart * towards, -limit, limit) for sign in (1, -1)]
    x, y = max(places, key=lambda place: float(np.hypot(*(place - start)))) if not far else places[0]
    return Actor(thing, colour, STILL, (float(x), float(y)), (0.0, 0.0), (radius, radius))
