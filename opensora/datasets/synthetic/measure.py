"""Recognizes shape, color, motion and background of a clip by image processing; the names are those of `render.py`.

Evaluates the embedded model: generate from a caption, measure the pixels, compare. Nothing is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from opensora.datasets.synthetic.render import BACKGROUNDS, COLOURS, NEW_SHAPES, SHAPES, Scene, render

SIDE = 64  # clips are reduced by a whole factor until the short side is below twice this
NEAR_BACKGROUND, NEAR_COLOUR = 60.0, 100.0  # farther than this from every palette colour (RGB distance) has no name
CONTRAST = 45.0  # RGB distance from the background at which a pixel may belong to an object
SMALLEST = 0.005  # of the frame's pixels: less is noise (the smallest rendered object covers 0.031)
TRAVEL, GROWTH = 16 / 64, np.log(1.6)  # displacement / short side and log radius ratio of a clear motion; half counts
DIAGONAL = 0.5  # least ratio of the two displacements of a motion down and to the right
FIT = 0.55  # least overlap (intersection over union) with a perfect shape, below which there is no object


class Measured(NamedTuple):
    """Names as in the tables of `render.py`; None if nothing was recognized."""

    shape: str | None
    colour: str | None
    motion: str | None
    background: str | None


def measure(video: np.ndarray, new: bool = False) -> Measured:
    """Shape, colour, motion and background of the clip `video`, uint8 [T, H, W, 3] of any size.

    The object is the largest connected region that differs from the border's colour. Shape by overlap with a perfect
    circle, square and triangle of the same area and centre; motion by the straight lines fitted to centre and radius.
    With `new`, also what adapters teach: NEW_SHAPES and NEW_MOTIONS.
    """
    video = reduce_size(video)
    num_frames, height, width = video.shape[:3]
    backdrop = border_colour(video)
    background = _nearest(backdrop, BACKGROUNDS, NEAR_BACKGROUND)
    coverage, colour = find_object(video, backdrop)
    area = coverage.sum((1, 2))
    times = np.flatnonzero(area >= SMALLEST * height * width)
    if 2 * len(times) < num_frames:
        return Measured(None, None, None, background)
    coverage, area, centre = coverage[times], area[times], _centres(coverage[times])
    shape = _shape(coverage, SHAPES + NEW_SHAPES if new else SHAPES)
    if shape is None:
        return Measured(None, None, None, background)
    motion = _motion(times / max(num_frames - 1, 1), centre / min(height, width), area, new)
    return Measured(shape, _nearest(colour, COLOURS, NEAR_COLOUR), motion, background)


def border_colour(video: np.ndarray) -> np.ndarray:
    """The median colour of the two outermost rows and columns, [3]."""
    inside = np.zeros(video.shape[1:3], bool)
    inside[2:-2, 2:-2] = True
    return np.median(video[:, ~inside].reshape(-1, 3), axis=0)


def reduce_size(video: np.ndarray) -> np.ndarray:
    """float32 [T, H, W, 3], averaged over blocks so that the short side is 64 to 127 pixels (or as it is, if less)."""
    factor = max(1, min(video.shape[1:3]) // SIDE)
    height, width = video.shape[1] // factor, video.shape[2] // factor
    video = video[:, : height * factor, : width * factor].astype(np.float32)
    return video.reshape(len(video), height, factor, width, factor, 3).mean((2, 4))


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]], limit: float) -> str | None:
    distance, name = min((float(np.linalg.norm(colour - np.array(value))), name) for name, value in palette.items())
    return name if distance <= limit else None


def find_object(video: np.ndarray, backdrop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each pixel belongs to the object, [T, H, W] in 0..1 (edges are soft), and the object's colour [3].

    A pixel's share is its position on the line from the background's colour to the object's. It is 0 everywhere if
    no pixel stands out.
    """
    offset = video - backdrop
    region = _largest_region(np.linalg.norm(offset, axis=-1) > CONTRAST)
    if not region.any():
        return np.zeros(video.shape[:3]), backdrop
    towards = np.median(offset[region], axis=0)
    for _ in range(2):  # the first guess includes edge pixels, the second only the core
        coverage = np.clip(offset @ towards / (towards @ towards), 0, 1)
        core = region & (coverage > 0.8)
        towards = np.median(offset[core], axis=0) if core.any() else towards
    near = spread(spread(_largest_region(coverage > 0.5)))
    return np.where(near, coverage, 0), backdrop + towards


def _largest_region(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected region of each frame of `mask`, bool [T, H, W]."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    before = np.zeros(0)
    while not np.array_equal(labels, before):  # the largest label of a region spreads until it fills the region
        labels, before = np.where(mask, spread(labels), 0), labels
    largest = np.zeros_like(mask)
    for frame, label in zip(largest, labels, strict=True):
        names, sizes = np.unique(label[label > 0], return_counts=True)
        if names.size:
            frame[:] = label == names[sizes.argmax()]
    return largest


def spread(values: np.ndarray) -> np.ndarray:
    """The largest of each pixel and its four neighbours, [T, H, W]; no value is below 0."""
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1)))
    rows, columns = padded[:, :, 1:-1], padded[:, 1:-1]
    return np.maximum.reduce([values, rows[:, :-2], rows[:, 2:], columns[:, :, :-2], columns[:, :, 2:]])


def _centres(coverage: np.ndarray) -> np.ndarray:
    """The centre (x, y) of each frame of `coverage` [T, H, W], [T, 2]: pixels, whose own centres are at one half."""
    height, width = coverage.shape[1:]
    x, y = coverage.sum(1) @ (np.arange(width) + 0.5), coverage.sum(2) @ (np.arange(height) + 0.5)
    return np.stack([x, y], axis=1) / coverage.sum((1, 2))[:, None]


def _shape(coverage: np.ndarray, shapes: Sequence[str]) -> str | None:
    """The shape that overlaps best, on average over the (up to eight) frames where the object is largest."""
    frames = np.argsort(coverage.sum((1, 2)))[::-1][:8]
    fits = {s: np.mean([overlap(coverage[t], draw_alike(s, coverage[t])) for t in frames]) for s in shapes}
    best = max(fits, key=fits.__getitem__)
    return best if fits[best] >= FIT else None


def overlap(coverage: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two objects, [H, W] each."""
    return float(np.minimum(coverage, other).sum() / np.maximum(coverage, other).sum())


def draw_alike(shape: str, coverage: np.ndarray) -> np.ndarray:
    """The perfect shape of the area and the centre of `coverage`, both [H, W]."""
    radius = np.sqrt(coverage.sum() / _unit_area(shape))
    return _draw(shape, radius, _centres(coverage[None])[0], *coverage.shape)


@cache
def _unit_area(shape: str) -> float:
    """The area of the shape of radius 1."""
    return float(_draw(shape, 100, np.array([110, 110]), 220, 220).sum()) / 100**2


def _draw(shape: str, radius: float, centre: np.ndarray, height: int, width: int) -> np.ndarray:
    """How far each pixel is covered by the rendered shape, [H, W] in 0..1."""
    scene = Scene(shape, "white", "standing still", "black", radius, radius, (centre[0], centre[1]), (0, 0))
    return render(scene, 1, height, width)[0, :, :, 0] / COLOURS["white"][0]


def _motion(times: np.ndarray, centre: np.ndarray, area: np.ndarray, diagonal: bool = False) -> str | None:
    """The motion that stands out most over the clip; None for a single frame. Time is 0..1, centres in short sides."""
    if len(times) < 2:
        return None
    x, y, growth = np.polyfit(times, np.column_stack([centre, np.log(area) / 2]), 1)[0]
    candidates = {
        "moving right" if x > 0 else "moving left": abs(x) / TRAVEL,
        "moving down" if y > 0 else "moving up": abs(y) / TRAVEL,
        "growing" if growth > 0 else "shrinking": abs(growth) / GROWTH,
        "standing still": 0.5,
    }
    if diagonal and x > 0 and y > 0 and DIAGONAL <= x / y <= 1 / DIAGONAL:
        candidates["moving diagonally"] = np.hypot(x, y) / TRAVEL
    return max(candidates, key=candidates.__getitem__)
