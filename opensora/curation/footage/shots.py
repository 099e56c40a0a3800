"""Shots: a picture seen by a moving camera, with an object before it and a text over it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from opensora.curation.footage.pictures import Subject, picture
from opensora.datasets.synthetic.render import COLOURS, SHAPES, signed_distance

GRAIN = 2.5  # levels of sensor noise
JITTER = 0.001  # of the width: a camera held by hand
WORDS = (
    "river",
    "runs",
    "slowly",
    "past",
    "an old",
    "mill",
    "while",
    "birds",
    "turn over",
    "fields",
    "grain",
    "comes home",
)


class Move(NamedTuple):
    """Motion of the camera per second: to the right and down in widths, growth of the picture, degrees clockwise."""

    right: float = 0
    down: float = 0
    growth: float = 0
    roll: float = 0

    @property
    def words(self) -> str:
        """The words of Open-Sora 1.2, joined by `+`."""
        names = (
            ("pan right", "pan left"), ("tilt down", "tilt up"), ("zoom in", "zoom out"), ("roll right", "roll left"),
        )  # fmt: skip
        found = [one if value > 0 else other for value, (one, other) in zip(self, names, strict=True) if value]
        return "+".join(found) or "static"


class Shot(NamedTuple):
    """What a shot is made of. `speed` of its object is in widths a second; `text` is "", "subtitle" or "title"."""

    subject: Subject
    move: Move
    num_frames: int
    object_size: float = 0  # radius in heights; 0 for none
    speed: float = 0
    text: str = ""
    seed: int = 0


class RenderedShot(NamedTuple):
    """Frames uint8 [T, H, W, 3], and the fraction of a frame that the box of its text covers."""

    frames: np.ndarray
    text_area: float


def draw_move(rng: np.random.Generator) -> Move:
    """A random move: none (one in five), one of the eight words, or two of different kinds (one in five)."""
    speeds = rng.uniform((0.07, 0.07, 0.1, 8), (0.25, 0.14, 0.2, 18)) * rng.choice((-1, 1), 4)
    kinds = rng.choice(4, rng.choice((0, 1, 2), p=(0.2, 0.6, 0.2)), replace=False)
    return Move(*(float(speed) if kind in kinds else 0 for kind, speed in enumerate(speeds)))


def draw_shot(rng: np.random.Generator, subject: Subject, num_frames: int) -> Shot:
    """A random shot of a subject: half of them with a moving object, one in four with a text."""
    size, speed = (rng.uniform(0.08, 0.15), rng.uniform(0.1, 0.3)) if rng.random() < 0.5 else (0, 0)
    text = str(rng.choice(("", "", "", "subtitle", "subtitle", "title"), p=(0.25, 0.25, 0.25, 0.1, 0.05, 0.1)))
    return Shot(subject, draw_move(rng), num_frames, float(size), float(speed), text, int(rng.integers(2**31)))


def render_shot(shot: Shot, height: int, width: int, fps: float) -> RenderedShot:
    """Renders a shot; equal shots give equal frames."""
    rng = np.random.default_rng(shot.seed)
    frames = _filmed(rng, picture(rng, shot.subject, 3 * height, 3 * width), shot, height, width, fps)
    if shot.object_size:
        _add_object(rng, frames, shot, fps)
    area = _add_text(rng, frames, shot.text) if shot.text else 0.0
    return RenderedShot(_grainy(rng, frames), area)


def _filmed(rng: np.random.Generator, plane: np.ndarray, shot: Shot, height: int, width: int, fps: float) -> np.ndarray:
    """The plane [3H, 3W, 3] as the camera sees it, from its middle."""
    from PIL import Image

    image, frames, move = Image.fromarray(plane), [], shot.move
    times = (np.arange(shot.num_frames) - shot.num_frames // 2) / fps  # the middle of the plane is seen half-way
    scale, angle = np.exp(-move.growth * times), np.radians(move.roll * times)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    speed = width / fps * np.stack([cos * move.right - sin * move.down, sin * move.right + cos * move.down], 1)
    shake = np.cumsum(rng.normal(0, JITTER * width, (shot.num_frames, 2)), 0)
    path = np.cumsum(speed, 0) + shake - np.linspace(0, 1, shot.num_frames)[:, None] * shake[-1]
    path += np.array([1.5 * width, 1.5 * height]) - path[shot.num_frames // 2]
    for (x, y), c, s in zip(path, cos, sin, strict=True):
        matrix = (c, -s, x - c * width / 2 + s * height / 2, s, c, y - s * width / 2 - c * height / 2)
        moved = image.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        frames.append(np.asarray(moved))
    return np.stack(frames)


def _add_object(rng: np.random.Generator, frames: np.ndarray, shot: Shot, fps: float) -> None:
    """Draws a shape that crosses the frames in a random direction."""
    height, width = frames.shape[1:3]
    colour, shape = np.array(COLOURS[str(rng.choice(list(COLOURS)))]), str(rng.choice(SHAPES))
    angle, middle = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.65, 2) * (width, height)
    velocity = shot.speed * width / fps * np.array([np.cos(angle), np.sin(angle)])
    rows, columns = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
    for number, frame in enumerate(frames):
        x, y = middle + velocity * (number - len(frames) / 2)
        distance = signed_distance(shape, columns - x, rows - y, np.array(shot.object_size * height))
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        frame[:] = np.round(frame + cover * (colour - frame))


def _add_text(rng: np.random.Generator, frames: np.ndarray, kind: str) -> float:
    """Draws a text: a subtitle of one line at the bottom, or a title in the middle. Returns the share of its box."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = frames.shape[1:3]
    count, size = (5, height / 11) if kind == "subtitle" else (2, height / 5)
    text = " ".join(rng.choice(WORDS, count))
    font = ImageFont.load_default(round(size))
    left, top, right, bottom = font.getbbox(text, stroke_width=1)
    x = (width - right - left) / 2
    y = 0.95 * height - bottom if kind == "subtitle" else (height - bottom - top) / 2
    mask = Image.new("LA", (width, height))
    ImageDraw.Draw(mask).text((x, y), text, fill=(255, 255), font=font, stroke_width=1, stroke_fill=(0, 255))
    ink = np.asarray(mask).astype(np.uint16)
    frames[:] = (frames * (255 - ink[..., 1:]) + ink[..., :1] * ink[..., 1:]) // 255
    box = (min(x + right, width) - max(x + left, 0)) * (bottom - top)
    return float(box / (height * width))


def _grainy(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
    """Frames with the noise of a sensor, another one for each."""
    height, width = frames.shape[1:3]
    grain = np.round(rng.normal(0, GRAIN, (2 * height, 2 * width, 1))).astype(np.int16)
    for frame in frames:
        row, column = rng.integers(0, (height, width))
        frame[:] = np.clip(frame + grain[row : row + height, column : column + width], 0, 255)
    return frames
