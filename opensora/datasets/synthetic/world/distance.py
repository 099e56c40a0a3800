"""Signed distances to flat shapes: negative inside, in the unit of the coordinates; y points down.

Formulas: I. Quilez, "2D distance functions" (iquilezles.org/articles/distfunctions2d), rewritten for NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray
Points = Sequence[tuple[float, float]]


def disc(x: Array, y: Array, cx: float, cy: float, radius: float) -> Array:
    """A disc."""
    return np.hypot(x - cx, y - cy) - radius


def ellipse(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float) -> Array:
    """An ellipse; to first order, exact on the outline."""
    x, y = x - cx, y - cy
    value = np.hypot(x / rx, y / ry)
    slope = np.hypot(x / rx**2, y / ry**2)
    return value * (value - 1) / np.maximum(slope, 1e-6)


def box(x: Array, y: Array, cx: float, cy: float, half_width: float, half_height: float, round_: float = 0.0) -> Array:
    """A rectangle with corners of radius `round_`."""
    dx, dy = np.abs(x - cx) - half_width + round_, np.abs(y - cy) - half_height + round_
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - round_


def segment(x: Array, y: Array, start: tuple[float, float], end: tuple[float, float], radius: float) -> Array:
    """A line with round ends."""
    ex, ey = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * ex + (y - start[1]) * ey) / (ex * ex + ey * ey), 0, 1)
    return np.hypot(x - start[0] - along * ex, y - start[1] - along * ey) - radius


def polygon(x: Array, y: Array, points: Points) -> Array:
    """A polygon without crossings."""
    squared = np.full(np.broadcast(x, y).shape, np.inf, np.float32)
    inside = np.zeros(squared.shape, bool)
    for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (wx - along * ex) ** 2 + (wy - along * ey) ** 2)
        crosses = (ay > y) != (by > y)
        if by != ay:
            inside ^= crosses & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -1, 1) * np.sqrt(squared)


def union(*shapes: Array) -> Array:
    """Everything that is in one of the shapes."""
    return np.minimum.reduce(np.broadcast_arrays(*shapes))


def cut(shape: Array, hole: Array) -> Array:
    """The shape without the hole."""
    return np.maximum(shape, -hole)


def common(*shapes: Array) -> Array:
    """What is in all shapes."""
    return np.maximum.reduce(np.broadcast_arrays(*shapes))


def star_points(corners: int, inner: float, turn: float = 0.0) -> list[tuple[float, float]]:
    """The outline of a star that fits in the unit circle, first corner up."""
    angles = np.arange(2 * corners) * np.pi / corners + turn
    radii = np.where(np.arange(2 * corners) % 2 == 0, 1.0, inner)
    return [(float(r * np.sin(a)), float(-r * np.cos(a))) for r, a in zip(radii, angles, strict=True)]
