"""The scenes of the world: pictures behind the things, drawn at any camera position.

Coordinates are in short sides of the frame, the origin at its centre and y down, before the camera moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from opensora.datasets.synthetic.world.distance import Array, box, disc, ellipse, polygon, union

PLAIN = {"black": (0, 0, 0), "gray": (100, 100, 100), "dark blue": (10, 15, 85), "dark green": (10, 65, 20)}
REACH = 2.6  # scenes are drawn this far to both sides of the origin, which the camera never leaves

Colour = tuple[int, int, int]


class Canvas:
    """The pixels of frames while a scene is drawn: coordinates x, y [T, H, W] and the size of a pixel [T, 1, 1]."""

    def __init__(self, x: Array, y: Array, pixel: Array) -> None:
        self.x, self.y, self.pixel = x, y, pixel
        self.colour = np.zeros((*np.broadcast(x, y).shape, 3), np.float32)

    def gradient(self, top: Colour, bottom: Colour, start: float = -0.7, end: float = 0.7) -> None:
        """Fills everything from `top` at y = start to `bottom` at y = end."""
        share = np.clip((self.y - start) / (end - start), 0, 1)[..., None]
        self.colour[:] = np.array(top, np.float32) * (1 - share) + np.array(bottom, np.float32) * share

    def paint(self, distance: Array, colour: Colour) -> None:
        """Covers where `distance` is negative; edges are soft over one pixel."""
        coverage = np.clip(0.5 - distance / self.pixel, 0, 1)[..., None]
        self.colour += coverage * (np.array(colour, np.float32) - self.colour)


Draw = Callable[[Canvas, np.random.Generator], None]


def _sky(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient((118, 178, 236), (196, 226, 248))
    x, y = canvas.x, canvas.y
    for cx in np.arange(-REACH, REACH, 0.62) + rng.uniform(-0.1, 0.1):
        cy, size = rng.uniform(-0.42, 0.38), rng.uniform(0.07, 0.1)
        puffs = [
            disc(x, y, cx + dx * size, cy + dy * size, r * size)
            for dx, dy, r in ((-0.9, 0, 0.7), (0, -0.3, 1), (1, 0, 0.75))
        ]
        canvas.paint(union(*puffs), (240, 246, 252))


def _night(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient((8, 10, 34), (30, 34, 78))
    for cx in np.arange(-REACH, REACH, 0.16):
        cy, size = rng.uniform(-0.75, 0.75), rng.uniform(0.008, 0.016)
        canvas.paint(disc(canvas.x, canvas.y, cx + rng.uniform(-0.06, 0.06), cy, size), (226, 228, 240))


def _sea(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient((176, 216, 242), (208, 232, 246), -0.7, 0.05)
    x, y = canvas.x, canvas.y
    canvas.paint(0.06 - y, (34, 112, 152))
    for row, top in enumerate((0.16, 0.3, 0.44, 0.6)):
        phase = rng.uniform(0, 0.3)
        crest = np.abs(y - top - 0.018 * np.cos((x + phase) * (21 - 2 * row))) - 0.009 - 0.002 * row
        canvas.paint(crest, (92, 164, 196))
    for cx in np.arange(-REACH, REACH, 0.9) + rng.uniform(-0.2, 0.2):
        canvas.paint(np.maximum(ellipse(x, y, cx, 0.07, 0.2, 0.07), y - 0.06), (120, 140, 130))


def _meadow(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient((178, 216, 244), (214, 234, 248), -0.7, 0.05)
    x, y = canvas.x, canvas.y
    for cx in np.arange(-REACH, REACH, 0.7) + rng.uniform(-0.2, 0.2):
        canvas.paint(ellipse(x, y, cx, 0.22, 0.5, rng.uniform(0.22, 0.34)), (124, 170, 104))
    canvas.paint(0.14 - y, (104, 156, 78))
    for cx in np.arange(-REACH, REACH, 0.17):
        colour = ((244, 236, 214), (240, 214, 110), (226, 150, 170))[rng.integers(3)]
        canvas.paint(disc(x, y, cx, rng.uniform(0.22, 0.72), 0.017), colour)


def _desert(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient((236, 206, 168), (248, 228, 192), -0.7, 0.1)
    x, y = canvas.x, canvas.y
    for cx in np.arange(-REACH, REACH, 0.85) + rng.uniform(-0.2, 0.2):
        canvas.paint(ellipse(x, y, cx, 0.3, 0.6, rng.uniform(0.22, 0.32)), (216, 172, 112))
    canvas.paint(0.24 - y, (200, 152, 92))
    for cx in np.arange(-REACH, REACH, 0.75) + rng.uniform(-0.2, 0.2):
        arms = [box(x, y, cx - 0.05, 0.16, 0.045, 0.016, 0.016), box(x, y, cx - 0.085, 0.12, 0.016, 0.055, 0.016)]
        canvas.paint(union(box(x, y, cx, 0.17, 0.022, 0.14, 0.022), *arms), (74, 110, 70))


def _snow(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient((162, 184, 206), (206, 218, 230), -0.7, 0.1)
    x, y = canvas.x, canvas.y
    for cx in np.arange(-REACH, REACH, 0.8) + rng.uniform(-0.2, 0.2):
        canvas.paint(ellipse(x, y, cx, 0.3, 0.6, rng.uniform(0.2, 0.3)), (222, 230, 238))
    canvas.paint(0.2 - y, (238, 242, 246))
    for cx in np.arange(-REACH, REACH, 0.42):
        foot, tall = rng.uniform(0.2, 0.3), rng.uniform(0.16, 0.24)
        cx = cx + rng.uniform(-0.1, 0.1)
        tiers = [
            polygon(
                x,
                y,
                [
                    (cx, foot - tall * (k + 1.3) / 2.3),
                    (cx + 0.08 - 0.02 * k, foot - tall * k / 2.6),
                    (cx - 0.08 + 0.02 * k, foot - tall * k / 2.6),
                ],
            )
            for k in (0, 1)
        ]
        canvas.paint(union(*tiers), (62, 96, 92))


def _city(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient((72, 56, 116), (226, 138, 116), -0.7, 0.5)
    x, y = canvas.x, canvas.y
    left = -REACH
    while left < REACH:
        width, top = rng.uniform(0.14, 0.24), rng.uniform(-0.02, 0.3)
        canvas.paint(box(x, y, left + width / 2, top + 1, width / 2, 1), (44, 38, 66))
        for column in np.arange(left + 0.035, left + width - 0.02, 0.055):
            for row in np.arange(top + 0.04, 0.72, 0.085):
                if rng.random() < 0.4:
                    canvas.paint(box(x, y, column + 0.008, row, 0.011, 0.018), (238, 200, 122))
        left += width + rng.uniform(0.0, 0.03)


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
