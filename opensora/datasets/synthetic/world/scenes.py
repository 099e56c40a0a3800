"""The scenes of the world: pictures behind the things, drawn at any camera position.

Coordinates are in short sides of the frame, the origin at its centre and y down, before the camera moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from opensora.datasets.synthetic.render import BACKGROUNDS
from opensora.datasets.synthetic.world.distance import Array, box, disc, ellipse, polygon, union

PLAIN = BACKGROUNDS
REACH = 2.6  # scenes are drawn this far to both sides of the origin, which the camera never leaves

Colour = tuple[int, int, int]
Distance = Callable[[Array, Array], Array]


class Box(NamedTuple):
    """A shape is within these coordinates."""

    left: float = -np.inf
    top: float = -np.inf
    right: float = np.inf
    bottom: float = np.inf


_EVERYWHERE = Box()


class Canvas:
    """The pixels of frames while a scene is drawn: coordinates x [T, 1, W], y [T, H, 1], size of a pixel [T, 1, 1]."""

    def __init__(self, x: Array, y: Array, pixel: Array) -> None:
        self.x, self.y, self.pixel = x, y, pixel
        self.colour = np.zeros((*np.broadcast(x, y).shape, 3), np.float32)

    def gradient(self, top: Colour, bottom: Colour, start: float = -0.7, end: float = 0.7) -> None:
        """Fills everything from `top` at y = start to `bottom` at y = end."""
        share = np.clip((self.y - start) / (end - start), 0, 1)[..., None]
        self.colour[:] = np.array(top, np.float32) * (1 - share) + np.array(bottom, np.float32) * share

    def paint(self, distance: Distance, colour: Colour, within: Box = _EVERYWHERE) -> None:
        """Covers where `distance` is negative; edges are soft over one pixel. Only pixels `within` are computed."""
        edge = self.pixel.max()
        columns = np.flatnonzero(((self.x >= within.left - edge) & (self.x <= within.right + edge)).any((0, 1)))
        rows = np.flatnonzero(((self.y >= within.top - edge) & (self.y <= within.bottom + edge)).any((0, 2)))
        if not len(columns) or not len(rows):
            return
        wide, high = slice(columns[0], columns[-1] + 1), slice(rows[0], rows[-1] + 1)
        coverage = np.clip(0.5 - distance(self.x[:, :, wide], self.y[:, high]) / self.pixel, 0, 1)[..., None]
        covered = self.colour[:, high, wide]
        covered += coverage * (np.array(colour, np.float32) - covered)


Draw = Callable[[Canvas, np.random.Generator], None]


def around(x: float, y: float, width: float, height: float) -> Box:
    """The box with this centre, half width and half height."""
    return Box(x - width, y - height, x + width, y + height)


def _sky(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient((118, 178, 236), (196, 226, 248))
    for cx in np.arange(-REACH, REACH, 0.62) + rng.uniform(-0.1, 0.1):
        cy, size = rng.uniform(-0.42, 0.38), rng.uniform(0.07, 0.1)
        puffs = [
            (cx + dx * size, cy + dy * size, r * size) for dx, dy, r in ((-0.9, 0, 0.7), (0, -0.3, 1), (1, 0, 0.75))
        ]
        cloud = partial(_discs, puffs)
        canvas.paint(cloud, (240, 246, 252), around(cx, cy, 2 * size, 1.5 * size))


def _discs(discs: Sequence[tuple[float, float, float]], x: Array, y: Array) -> Array:
    return union(*(disc(x, y, *one) for one in discs))


def _night(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient((8, 10, 34), (30, 34, 78))
    for cx in np.arange(-REACH, REACH, 0.16):
        cy, size = rng.uniform(-0.75, 0.75), rng.uniform(0.008, 0.016)
        star = (cx + rng.uniform(-0.06, 0.06), cy, size)
        canvas.paint(partial(_discs, [star]), (226, 228, 240), around(*star, size))


def _sea(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient((176, 216, 242), (208, 232, 246), -0.7, 0.05)
    canvas.paint(lambda x, y: 0.06 - y, (34, 112, 152), Box(top=0.06))
    for row, top in enumerate((0.16, 0.3, 0.44, 0.6)):
        phase = rng.uniform(0, 0.3)

        def crest(x: Array, y: Array, row: int = row, top: float = top, phase: float = phase) -> Array:
            return np.abs(y - top - 0.018 * np.cos((x + phase) * (21 - 2 * row))) - 0.009 - 0.002 * row

        canvas.paint(crest, (92, 164, 196), Box(top=top - 0.04, bottom=top + 0.04))
    for cx in np.arange(-REACH, REACH, 0.9) + rng.uniform(-0.2, 0.2):
        canvas.paint(partial(_island, cx), (120, 140, 130), around(cx, 0.07, 0.2, 0.07))


def _island(cx: float, x: Array, y: Array) -> Array:
    return np.maximum(ellipse(x, y, cx, 0.07, 0.2, 0.07), y - 0.06)


def _hills(
    canvas: Canvas, rng: np.random.Generator, gap: float, y: float, width: float, heights: tuple[float, float],
    colour: Colour,
) -> None:  # fmt: skip
    """A row of ellipses."""
    for cx in np.arange(-REACH, REACH, gap) + rng.uniform(-0.2, 0.2):
        hill = (cx, y, width, rng.uniform(*heights))
        canvas.paint(partial(_ellipse, hill), colour, around(*hill))


def _ellipse(hill: tuple[float, float, float, float], x: Array, y: Array) -> Array:
    return ellipse(x, y, *hill)


def _meadow(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient((178, 216, 244), (214, 234, 248), -0.7, 0.05)
    _hills(canvas, rng, 0.7, 0.22, 0.5, (0.22, 0.34), (124, 170, 104))
    canvas.paint(lambda x, y: 0.14 - y, (104, 156, 78), Box(top=0.14))
    for cx in np.arange(-REACH, REACH, 0.17):
        colour = ((244, 236, 214), (240, 214, 110), (226, 150, 170))[rng.integers(3)]
        flower = (cx, rng.uniform(0.22, 0.72), 0.017)
        canvas.paint(partial(_discs, [flower]), colour, around(*flower, 0.017))


def _desert(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient((236, 206, 168), (248, 228, 192), -0.7, 0.1)
    _hills(canvas, rng, 0.85, 0.3, 0.6, (0.22, 0.32), (216, 172, 112))
    canvas.paint(lambda x, y: 0.24 - y, (200, 152, 92), Box(top=0.24))
    for cx in np.arange(-REACH, REACH, 0.75) + rng.uniform(-0.2, 0.2):
        canvas.paint(partial(_cactus, cx), (74, 110, 70), around(cx, 0.17, 0.12, 0.15))


def _cactus(cx: float, x: Array, y: Array) -> Array:
    arms = [box(x, y, cx - 0.05, 0.16, 0.045, 0.016, 0.016), box(x, y, cx - 0.085, 0.12, 0.016, 0.055, 0.016)]
    return union(box(x, y, cx, 0.17, 0.022, 0.14, 0.022), *arms)


def _snow(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient((162, 184, 206), (206, 218, 230), -0.7, 0.1)
    _hills(canvas, rng, 0.8, 0.3, 0.6, (0.2, 0.3), (222, 230, 238))
    canvas.paint(lambda x, y: 0.2 - y, (238, 242, 246), Box(top=0.2))
    for cx in np.arange(-REACH, REACH, 0.42):
        foot, tall = rng.uniform(0.2, 0.3), rng.uniform(0.16, 0.24)
        cx = cx + rng.uniform(-0.1, 0.1)
        canvas.paint(partial(_fir, cx, foot, tall), (62, 96, 92), Box(cx - 0.08, foot - tall, cx + 0.08, foot))


def _fir(cx: float, foot: float, tall: float, x: Array, y: Array) -> Array:
    tiers = []
    for k in (0, 1):
        side, low = 0.08 - 0.02 * k, foot - tall * k / 2.6
        tiers.append(polygon(x, y, [(cx, foot - tall * (k + 1.3) / 2.3), (cx + side, low), (cx - side, low)]))
    return union(*tiers)


def _city(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient((72, 56, 116), (226, 138, 116), -0.7, 0.5)
    left = -REACH
    while left < REACH:
        width, top = rng.uniform(0.14, 0.24), rng.uniform(-0.02, 0.3)
        _block(canvas, (left + width / 2, top + 1, width / 2, 1), (44, 38, 66))
        for column in np.arange(left + 0.035, left + width - 0.02, 0.055):
            for row in np.arange(top + 0.04, 0.72, 0.085):
                if rng.random() < 0.4:
                    _block(canvas, (column + 0.008, row, 0.011, 0.018), (238, 200, 122))
        left += width + rng.uniform(0.0, 0.03)


def _block(canvas: Canvas, sides: tuple[float, float, float, float], colour: Colour) -> None:
    """A rectangle: centre, half width and half height."""
    canvas.paint(lambda x, y: box(x, y, *sides), colour, around(*sides))


def _plain(colour: Colour) -> Draw:
    def draw(canvas: Canvas, rng: np.random.Generator) -> None:
        canvas.colour[:] = np.array(colour, np.float32)

    return draw


class Scene(NamedTuple):
    """How a scene is drawn, the phrases that follow a thing, and the colours of things that would not show on it."""

    draw: Draw
    phrases: tuple[str, ...]
    hides: tuple[str, ...] = ()


SCENES: dict[str, Scene] = {
    **{
        name: Scene(_plain(colour), (f"on a {name} background", f"against {name}", f"on {name}"))
        for name, colour in PLAIN.items()
    },
    "sky": Scene(_sky, ("in the sky", "in a blue sky with clouds", "against the sky"), ("white", "cyan", "blue")),
    "night": Scene(_night, ("at night with stars", "in a starry night", "under the stars"), ()),
    "sea": Scene(_sea, ("at the sea", "over the sea", "by the ocean"), ("white", "cyan", "blue")),
    "meadow": Scene(_meadow, ("on a meadow", "in a green field", "over a meadow"), ("white", "cyan", "green")),
    "desert": Scene(_desert, ("in the desert", "over the desert", "in a sandy desert"), ("white", "yellow", "orange")),
    "snow": Scene(_snow, ("in the snow", "in a snowy land", "over the snow"), ("white", "cyan")),
    "city": Scene(
        _city, ("over a city at dusk", "in a city at dusk", "above the city in the evening"), ("purple", "orange")
    ),
}
PICTURES = tuple(name for name in SCENES if name not in PLAIN)  # scenes on which a moving camera shows
