"""Recognizes thing, colour, motion, scene and camera of a clip of the world by image processing; nothing is learned."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from opensora.datasets.synthetic.world.background import recognize_camera, recognize_scene
from opensora.datasets.synthetic.world.motions import MOTIONS, PAN, STILL, ZOOM
from opensora.datasets.synthetic.world.palette import COLOURS, NEAR_COLOUR
from opensora.datasets.synthetic.world.scenes import SCENES
from opensora.datasets.synthetic.world.things import MAIN, SYMMETRY, THINGS

Array = np.ndarray
SMALLEST = 0.004  # of the frame's pixels: less is no thing
FIT = 0.7  # least overlap (intersection over union) with a template
GRID, ANGLES = 40, 32  # side of a template, and how many rotations are tried
TURNING, MIRRORING = 0.05, 0.3  # fit that a radian of rotation and a mirroring must gain
CLEAR, LEAST_CLEAR = 0.85, 6  # frames with this part of the best fit tell the motion, if there are so many
SPREAD = 0.27  # root of a template's area, in parts of its side
TRAVEL, GROWTH, TURN, SWING, BOUNCE = 0.13, np.log(1.35), 1.0, 0.2, 0.12  # least of a clear motion


class Track(NamedTuple):
    """A thing in the frames where it shows: indices, centres and radii in short sides, angles, fits; all [N].

    The centre is that of the thing's main colour, which need not be the centre of its drawing.
    """

    frames: Array
    x: Array
    y: Array
    radius: Array
    angle: Array
    fit: Array
    mirrored: Array


class Recognized(NamedTuple):
    """Names as in the tables of the world; None where nothing is recognized."""

    thing: str | None
    colour: str | None
    motion: str | None
    scene: str | None
    camera: str | None
    track: Track | None = None


def recognize(video: Array, colour: str | None = None) -> Recognized:
    """What the clip `video`, uint8 [T, H, W, 3], shows; with `colour`, about the thing of that colour."""
    video = video.astype(np.float32)
    scene = recognize_scene(video)
    hidden = SCENES[scene].hides if scene else ()
    masks = {name: colour_mask(video, name) for name in ([colour] if colour else COLOURS) if name not in hidden}
    if not masks:
        return Recognized(None, None, None, scene, None)
    sizes = {name: float(mask.mean()) for name, mask in masks.items()}
    found = max(sizes, key=sizes.__getitem__)
    if sizes[found] < SMALLEST:
        return Recognized(None, None, None, scene, recognize_camera(video, np.zeros(video.shape[:3], bool), scene))
    thing, track = recognize_thing(masks[found])
    camera = recognize_camera(video, around(track, masks[found]), scene)
    motion = recognize_motion(thing, track, camera, len(video)) if thing and track else None
    return Recognized(thing, found, motion, scene, camera, track)


def colour_mask(video: Array, colour: str) -> Array:
    """How far each pixel has a palette colour, [T, H, W] in 0..1, without what lies far from the rest."""
    distances = {name: np.linalg.norm(video - np.array(value, np.float32), axis=-1) for name, value in COLOURS.items()}
    nearest = np.minimum.reduce(list(distances.values()))
    soft = np.clip(1.5 - distances[colour] / NEAR_COLOUR, 0, 1) * (distances[colour] <= nearest)
    return soft * _near_centre(soft > 0.5)


def _near_centre(mask: Array) -> Array:
    """The pixels of each frame that are near the middle of them all; far ones belong to something else."""
    kept = np.zeros_like(mask)
    for frame, target in zip(mask, kept, strict=True):
        rows, columns = np.nonzero(frame)
        if len(rows):
            distance = np.hypot(rows - np.median(rows), columns - np.median(columns))
            near = distance <= 1.5 * np.sqrt(len(rows))
            target[rows[near], columns[near]] = True
    return kept


def around(track: Track | None, mask: Array) -> Array:
    """The pixels that a thing may cover, with the parts that have not its colour."""
    covered = mask > 0
    if track is None:
        return covered
    height, width = mask.shape[1:]
    side = min(height, width)
    x, y = (np.arange(width) + 0.5 - width / 2) / side, (np.arange(height) + 0.5 - height / 2) / side
    for frame, cx, cy, radius in zip(track.frames, track.x, track.y, track.radius, strict=True):
        covered[frame] |= np.hypot(x[None] - cx, y[:, None] - cy) <= 1.5 * radius
    return covered


@cache
def _templates() -> tuple[list[str], Array, Array]:
    """Names of things, their pictures [things, 2 * ANGLES, GRID, GRID], mirrored ones last, and radii per spread."""
    names, pictures, radii = list(THINGS), [], []
    angles = np.arange(ANGLES) * 2 * np.pi / ANGLES
    for name in names:
        cx, cy, spread = moments(name)
        radii.append(1 / spread)
        grid = (np.arange(GRID) + 0.5 - GRID / 2) / (SPREAD * GRID) * spread
        rows = []
        for mirror in (1, -1):
            for angle in angles:
                x, y = grid[None], grid[:, None]
                u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
                rows.append(main_colour(name, mirror * u + cx, v + cy, spread / (SPREAD * GRID)))
        pictures.append(np.stack(rows))
    return names, np.stack(pictures).astype(np.float32), np.array(radii)


def main_colour(name: str, x: Array, y: Array, pixel: float) -> Array:
    """How far each point shows the thing's main colour."""
    shown = np.zeros(np.broadcast(x, y).shape)
    for layer in THINGS[name]:
        coverage = np.clip(0.5 - layer.distance(x, y) / pixel, 0, 1)
        shown = shown + coverage * ((layer.paint == MAIN) - shown)
    return shown


@cache
def moments(name: str) -> tuple[float, float, float]:
    """Centre of the main colour, and the root of its area, for radius 1."""
    axis = np.linspace(-1.1, 1.1, 220)
    shown = main_colour(name, axis[None], axis[:, None], 0.01)
    area = shown.sum()
    return (
        float((shown.sum(0) * axis).sum() / area),
        float((shown.sum(1) * axis).sum() / area),
        float(np.sqrt(area) * 0.01),
    )


def template_fits(mask: Array) -> tuple[Array, Array, Array, Array]:
    """Centres x, y [N] and roots of the areas [N] in pixels of masks [N, H, W], and their overlaps with all templates.

    The overlaps, intersection over union, are [N, things, 2 * ANGLES].
    """
    height, width = mask.shape[1:]
    area = mask.sum((1, 2))
    x = mask.sum(1) @ (np.arange(width) + 0.5) / area
    y = mask.sum(2) @ (np.arange(height) + 0.5) / area
    spread = np.sqrt(area)
    names, templates, _ = _templates()
    cuts = np.stack([_cut(one, cx, cy, size) for one, cx, cy, size in zip(mask, x, y, spread, strict=True)])
    flat = templates.reshape(-1, GRID * GRID)
    overlap = cuts.reshape(len(cuts), -1) @ flat.T
    total = (cuts**2).sum((1, 2))[:, None] + (flat**2).sum(1)[None]
    return x, y, spread, (overlap / (total - overlap)).reshape(len(cuts), len(names), -1)


def recognize_thing(mask: Array) -> tuple[str | None, Track | None]:
    """The thing whose templates overlap best with the regions of `mask`, and where it is."""
    height, width = mask.shape[1:]
    side = min(height, width)
    area = mask.sum((1, 2))
    frames = np.flatnonzero(area >= SMALLEST * height * width)
    if 2 * len(frames) < len(mask):
        return None, None
    names, _, radii = _templates()
    x, y, spread, fits = template_fits(mask[frames])
    score = np.sort(fits.max(2), axis=0)[len(fits) // 2 :].mean(0)
    upright = np.sort(fits[:, :, [0, ANGLES]].max(2), axis=0)[len(fits) // 2 :].mean(0)
    score = score + 0.02 * (upright >= score - 0.02)  # a thing that stands upright is the likelier one
    best = int(score.argmax())
    if score[best] < FIT:
        return None, None
    choice = _steady(fits[:, best])
    centre = (x - width / 2) / side, (y - height / 2) / side
    angle = choice % ANGLES * 2 * np.pi / ANGLES
    radius, fit = spread / side * radii[best], fits[:, best].max(1)
    return names[best], Track(frames, *centre, radius, angle, fit, choice >= ANGLES)


def _steady(fits: Array) -> Array:
    """The rotation of each frame, [N], of fits [N, 2 * ANGLES]: those that fit best while it changes little.

    A thing that looks much the same upside down would else turn over from frame to frame.
    """
    angles = np.arange(2 * ANGLES) % ANGLES
    apart = np.abs(angles[:, None] - angles[None])
    change = TURNING * np.minimum(apart, ANGLES - apart) * 2 * np.pi / ANGLES
    change = change + MIRRORING * (np.arange(2 * ANGLES)[:, None] // ANGLES != np.arange(2 * ANGLES)[None] // ANGLES)
    total, before = fits[0] + 0.02 * (angles == 0), []
    for row in fits[1:]:
        reached = total[None] - change
        before.append(reached.argmax(1))
        total = reached.max(1) + row + 0.02 * (angles == 0)
    path = [int(total.argmax())]
    for links in reversed(before):
        path.append(int(links[path[-1]]))
    return np.array(path[::-1])


def _cut(mask: Array, cx: float, cy: float, spread: float) -> Array:
    """The region around a centre, at the size of a template, interpolated between pixels."""
    step = spread / (SPREAD * GRID)
    offsets = (np.arange(GRID) + 0.5 - GRID / 2) * step
    rows = _interpolation(cy - 0.5 + offsets, mask.shape[0])
    columns = _interpolation(cx - 0.5 + offsets, mask.shape[1])
    return (rows @ mask @ columns.T).astype(np.float32)


def _interpolation(positions: Array, size: int) -> Array:
    """Weights [positions, size] of linear interpolation between the pixels of a row; 0 outside."""
    return np.maximum(1 - np.abs(positions[:, None] - np.arange(size)[None]), 0)


def recognize_motion(thing: str, track: Track, camera: str | None, num_frames: int) -> str | None:
    """The motion that stands out most, after the camera's own; None for a single frame."""
    if len(track.frames) < 3:
        return None
    clear = track.fit >= CLEAR * track.fit.max()
    if clear.sum() >= LEAST_CLEAR:  # else something is in front of it
        track = Track(*(values[clear] for values in track))
    time = track.frames / max(num_frames - 1, 1)
    x, y, growth = track.x.copy(), track.y.copy(), np.log(track.radius)
    pace = (time - 0.5) * num_frames / 17
    if camera in ("pan left", "pan right"):
        x = x + PAN * pace * (1 if camera == "pan right" else -1)
    elif camera in ("zoom in", "zoom out"):
        sign = 1 if camera == "zoom in" else -1
        growth = growth - sign * np.log(ZOOM) * pace
        x, y = x * ZOOM ** (-sign * pace), y * ZOOM ** (-sign * pace)
    slopes = np.polyfit(time, np.column_stack([x, y, growth]), 1)[0]
    y_rest = y - np.polyval(np.polyfit(time, y, 1), time)
    symmetry = SYMMETRY.get(thing, 1)
    angle = np.unwrap(track.angle, period=2 * np.pi / symmetry) if symmetry in range(1, 7) else np.zeros(len(time))
    angle_slope = np.polyfit(time, angle, 1)[0]
    angle_rest = angle - np.polyval(np.polyfit(time, angle, 1), time)
    scores = {
        _direction(slopes[0], slopes[1]): np.hypot(slopes[0], slopes[1]) / TRAVEL,
        "growing" if slopes[2] > 0 else "shrinking": abs(slopes[2]) / GROWTH,
        "turning": abs(angle_slope) / TURN,
        "bouncing": np.ptp(y_rest) / BOUNCE,
        "swinging": np.ptp(angle_rest) / 2 / SWING if abs(angle_slope) < TURN else 0.0,
        STILL: 1.0,
    }
    return max(scores, key=scores.__getitem__)


def _direction(dx: float, dy: float) -> str:
    """One of the eight directions."""
    eighth = round(float(np.arctan2(dy, dx)) / (np.pi / 4)) % 8
    travels = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    return next(name for name, motion in MOTIONS.items() if motion.travel == travels[eighth])
