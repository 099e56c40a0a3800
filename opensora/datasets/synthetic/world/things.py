"""The things of the world: layers of flat shapes within the unit circle, one of them in the colour of the caption."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from opensora.datasets.synthetic.world.distance import (
    Array,
    box,
    common,
    cut,
    disc,
    ellipse,
    polygon,
    segment,
    star_points,
    union,
)

Distance = Callable[[Array, Array], Array]
MAIN = "main"  # the colour of the caption
PAINTS = {
    "dark": (38, 38, 48), "light": (248, 246, 238), "wood": (122, 78, 44), "leaf": (70, 140, 60),
    "flame": (255, 170, 40), "roof": (120, 50, 45), "centre": (255, 214, 80),
}  # fmt: skip


class Layer(NamedTuple):
    """A shape and its paint; later layers cover earlier ones."""

    distance: Distance
    paint: str = MAIN


def _sun(x: Array, y: Array) -> Array:
    rays = []
    for angle in np.arange(8) * np.pi / 4:
        c, s = float(np.cos(angle)), float(np.sin(angle))
        rays.append(segment(x, y, (0.7 * c, 0.7 * s), (0.93 * c, 0.93 * s), 0.075))
    return union(disc(x, y, 0, 0, 0.55), *rays)


def _heart(x: Array, y: Array) -> Array:
    lobes = union(disc(x, y, -0.42, -0.3, 0.46), disc(x, y, 0.42, -0.3, 0.46))
    return union(lobes, polygon(x, y, [(-0.78, -0.01), (0, -0.45), (0.78, -0.01), (0, 0.92)]))


def _petals(x: Array, y: Array) -> Array:
    angles = np.arange(6) * np.pi / 3
    return union(*(disc(x, y, 0.58 * float(np.sin(a)), -0.58 * float(np.cos(a)), 0.36) for a in angles))


def _car_body(x: Array, y: Array) -> Array:
    cabin = polygon(x, y, [(-0.55, 0.0), (-0.38, -0.48), (0.28, -0.48), (0.55, 0.0)])
    return union(cabin, box(x, y, 0, 0.17, 0.96, 0.26, 0.14))


def _car_windows(x: Array, y: Array) -> Array:
    left = polygon(x, y, [(-0.42, -0.04), (-0.31, -0.38), (-0.07, -0.38), (-0.07, -0.04)])
    return union(left, polygon(x, y, [(0.05, -0.04), (0.05, -0.38), (0.23, -0.38), (0.41, -0.04)]))


def _balloon(x: Array, y: Array) -> Array:
    return union(ellipse(x, y, 0, -0.3, 0.58, 0.68), polygon(x, y, [(-0.1, 0.47), (0, 0.34), (0.1, 0.47)]))


def _rocket(x: Array, y: Array) -> Array:
    return common(disc(x, y, -0.62, 0.15, 1.02), disc(x, y, 0.62, 0.15, 1.02), y - 0.55)


def _rocket_fins(x: Array, y: Array) -> Array:
    left = polygon(x, y, [(-0.3, 0.2), (-0.68, 0.72), (-0.26, 0.55)])
    return union(left, polygon(x, y, [(0.3, 0.2), (0.68, 0.72), (0.26, 0.55)]))


def _fish(x: Array, y: Array) -> Array:
    tail = polygon(x, y, [(-0.38, 0), (-0.95, -0.46), (-0.8, 0), (-0.95, 0.46)])
    return union(ellipse(x, y, 0.18, 0, 0.74, 0.46), tail)


def _bird(x: Array, y: Array) -> Array:
    body = ellipse(x, y, -0.05, 0.18, 0.58, 0.38)
    tail = polygon(x, y, [(-0.5, 0.1), (-0.97, -0.1), (-0.9, 0.28), (-0.45, 0.35)])
    return union(body, disc(x, y, 0.48, -0.2, 0.3), tail)


def _bird_wing(x: Array, y: Array) -> Array:
    return polygon(x, y, [(0.12, 0.12), (-0.32, -0.62), (-0.42, 0.16)])


def _cat(x: Array, y: Array) -> Array:
    left = polygon(x, y, [(-0.72, 0.0), (-0.74, -0.9), (-0.1, -0.42)])
    right = polygon(x, y, [(0.72, 0.0), (0.74, -0.9), (0.1, -0.42)])
    return union(ellipse(x, y, 0, 0.12, 0.8, 0.68), left, right)


def _cat_marks(x: Array, y: Array) -> Array:
    eyes = union(ellipse(x, y, -0.32, 0.0, 0.1, 0.15), ellipse(x, y, 0.32, 0.0, 0.1, 0.15))
    nose = polygon(x, y, [(-0.11, 0.24), (0.11, 0.24), (0, 0.36)])
    whiskers = [segment(x, y, (s * 0.3, 0.36 + d), (s * 0.72, 0.3 + 2 * d), 0.025) for s in (-1, 1) for d in (0, 0.09)]
    return union(eyes, nose, *whiskers)


def _face_marks(x: Array, y: Array) -> Array:
    eyes = union(disc(x, y, -0.34, -0.22, 0.12), disc(x, y, 0.34, -0.22, 0.12))
    smile = common(np.abs(np.hypot(x, y - 0.02) - 0.54) - 0.065, 0.2 - y)
    return union(eyes, smile)


def _umbrella(x: Array, y: Array) -> Array:
    dome = common(disc(x, y, 0, 0.1, 0.95), y - 0.1)
    for centre in (-0.634, 0.0, 0.634):
        dome = cut(dome, ellipse(x, y, centre, 0.12, 0.3, 0.16))
    return dome


def _umbrella_stick(x: Array, y: Array) -> Array:
    hook = common(np.abs(np.hypot(x - 0.14, y - 0.78) - 0.14) - 0.045, 0.78 - y)
    return union(segment(x, y, (0, -0.9), (0, 0.78), 0.045), hook)


def _cloud(x: Array, y: Array) -> Array:
    puffs = [(-0.52, 0.12, 0.36), (-0.12, -0.18, 0.46), (0.36, -0.02, 0.4), (0.64, 0.2, 0.28)]
    return union(*(disc(x, y, *puff) for puff in puffs), box(x, y, 0.03, 0.3, 0.88, 0.18, 0.17))


def _apple(x: Array, y: Array) -> Array:
    return union(ellipse(x, y, -0.26, 0.16, 0.5, 0.64), ellipse(x, y, 0.26, 0.16, 0.5, 0.64))


def _ball_bands(x: Array, y: Array) -> Array:
    return common(disc(x, y, 0, 0, 0.86), np.abs(np.abs(y - 0.0) - 0.34) - 0.1)


def _wings(x: Array, y: Array) -> Array:
    upper = union(ellipse(x, y, -0.48, -0.34, 0.42, 0.46), ellipse(x, y, 0.48, -0.34, 0.42, 0.46))
    lower = union(ellipse(x, y, -0.36, 0.4, 0.32, 0.38), ellipse(x, y, 0.36, 0.4, 0.32, 0.38))
    return union(upper, lower)


_TRIANGLE = [(0.0, -1.0), (0.866, 0.5), (-0.866, 0.5)]

THINGS: dict[str, tuple[Layer, ...]] = {
    "circle": (Layer(lambda x, y: disc(x, y, 0, 0, 0.9)),),
    "square": (Layer(lambda x, y: box(x, y, 0, 0, 0.78, 0.78)),),
    "triangle": (Layer(lambda x, y: polygon(x, y, _TRIANGLE)),),
    "sun": (Layer(_sun),),
    "moon": (Layer(lambda x, y: cut(disc(x, y, -0.1, 0, 0.85), disc(x, y, 0.34, -0.12, 0.68))),),
    "star": (Layer(lambda x, y: polygon(x, y, star_points(5, 0.42))),),
    "heart": (Layer(_heart),),
    "house": (
        Layer(lambda x, y: box(x, y, 0, 0.33, 0.68, 0.5)),
        Layer(lambda x, y: polygon(x, y, [(0, -0.88), (0.9, -0.12), (-0.9, -0.12)]), "roof"),
        Layer(lambda x, y: box(x, y, -0.28, 0.53, 0.16, 0.3), "dark"),
        Layer(lambda x, y: box(x, y, 0.28, 0.26, 0.18, 0.18), "light"),
    ),
    "tree": (
        Layer(lambda x, y: box(x, y, 0, 0.62, 0.12, 0.36), "wood"),
        Layer(lambda x, y: union(disc(x, y, 0, -0.5, 0.45), disc(x, y, -0.38, 0, 0.42), disc(x, y, 0.38, 0, 0.42))),
    ),
    "flower": (Layer(_petals), Layer(lambda x, y: disc(x, y, 0, 0, 0.28), "centre")),
    "car": (
        Layer(_car_body),
        Layer(_car_windows, "light"),
        Layer(lambda x, y: union(disc(x, y, -0.52, 0.42, 0.23), disc(x, y, 0.52, 0.42, 0.23)), "dark"),
    ),
    "boat": (
        Layer(lambda x, y: box(x, y, -0.06, -0.25, 0.045, 0.7), "wood"),
        Layer(lambda x, y: polygon(x, y, [(0.04, -0.92), (0.7, 0.18), (0.04, 0.18)]), "light"),
        Layer(lambda x, y: polygon(x, y, [(-0.95, 0.3), (0.95, 0.3), (0.6, 0.8), (-0.6, 0.8)])),
    ),
    "balloon": (Layer(lambda x, y: segment(x, y, (0, 0.45), (0.04, 0.97), 0.03), "dark"), Layer(_balloon)),
    "rocket": (
        Layer(lambda x, y: polygon(x, y, [(-0.2, 0.55), (0.2, 0.55), (0, 0.98)]), "flame"),
        Layer(_rocket_fins, "dark"),
        Layer(_rocket),
        Layer(lambda x, y: disc(x, y, 0, -0.12, 0.15), "light"),
    ),
    "fish": (Layer(_fish), Layer(lambda x, y: disc(x, y, 0.56, -0.1, 0.09), "dark")),
    "bird": (
        Layer(lambda x, y: polygon(x, y, [(0.72, -0.3), (0.99, -0.14), (0.72, -0.06)]), "flame"),
        Layer(_bird),
        Layer(_bird_wing, "light"),
        Layer(lambda x, y: disc(x, y, 0.56, -0.26, 0.075), "dark"),
    ),
    "cat": (Layer(_cat), Layer(_cat_marks, "dark")),
    "face": (Layer(lambda x, y: disc(x, y, 0, 0, 0.9)), Layer(_face_marks, "dark")),
    "umbrella": (Layer(_umbrella_stick, "dark"), Layer(_umbrella)),
    "cloud": (Layer(_cloud),),
    "apple": (
        Layer(lambda x, y: segment(x, y, (0, -0.4), (0.1, -0.88), 0.06), "wood"),
        Layer(lambda x, y: ellipse(x, y, 0.4, -0.68, 0.28, 0.14), "leaf"),
        Layer(_apple),
    ),
    "ball": (Layer(lambda x, y: disc(x, y, 0, 0, 0.9)), Layer(_ball_bands, "light")),
    "butterfly": (Layer(_wings), Layer(lambda x, y: ellipse(x, y, 0, 0, 0.09, 0.62), "dark")),
}
FACING = ("car", "boat", "fish", "bird")  # they look to the right, and are mirrored when they move left
SYMMETRY = {
    "circle": 0,
    "square": 4,
    "triangle": 3,
    "star": 5,
    "flower": 6,
    "sun": 8,
    "ball": 2,
}  # turns that look alike
