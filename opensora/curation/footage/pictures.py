"""Procedural pictures: a pattern of two colours with fine detail that optical flow can follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from opensora.datasets.synthetic.render import COLOURS

DETAIL = 45  # levels of the fine noise


class Subject(NamedTuple):
    """What the scenes of a film show: names of PATTERNS and COLOURS."""

    pattern: str
    first: str
    second: str

    @property
    def caption(self) -> str:
        return f"{self.first} and {self.second} {self.pattern}"


def draw_subject(rng: np.random.Generator) -> Subject:
    """A random pattern of two random colours."""
    first, second = rng.choice(list(COLOURS), 2, replace=False)
    return Subject(str(rng.choice(list(PATTERNS))), str(first), str(second))


def picture(rng: np.random.Generator, subject: Subject, height: int, width: int) -> np.ndarray:
    """A random picture [H, W, 3] uint8 of the subject. `height` and `width` are three times those of the frames."""
    unit = height / 3
    y, x = np.mgrid[:height, :width] / unit  # in heights of a frame
    warp_x, warp_y = (0.25 * noise(rng, height, width, 1.5) for _ in range(2))
    share = PATTERNS[subject.pattern](rng, x + warp_x, y + warp_y)[..., None]
    first, second = (np.array(COLOURS[name], float) * rng.uniform(0.6, 1) for name in (subject.first, subject.second))
    detail = sum(noise(rng, height, width, cells) for cells in (8, 16, 32))
    shade = 1 + 0.3 * noise(rng, height, width, 1)
    levels = (first * share + second * (1 - share)) * shade[..., None] + DETAIL * np.asarray(detail)[..., None]
    return np.clip(levels, 0, 255).astype(np.uint8)


def noise(rng: np.random.Generator, height: int, width: int, cells: float) -> np.ndarray:
    """Smooth noise [H, W] in about [-1, 1], with `cells` random values per height of a frame."""
    from PIL import Image

    rows = max(round(3 * cells), 2)
    coarse = rng.uniform(-1, 1, (rows, max(round(rows * width / height), 2))).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _stripes(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.3, 0.6)
    return _edge(np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period))


def _checks(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.4, 0.8)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return _edge(4 * np.sin(2 * np.pi * u / period) * np.sin(2 * np.pi * v / period))


def _dots(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    period = rng.uniform(0.35, 0.7)
    phase = rng.uniform(0, 2 * np.pi, 2)
    u, v = np.cos(2 * np.pi * x / period + phase[0]), np.cos(2 * np.pi * y / period + phase[1])
    return _edge(3 * (u + v - 0.7))


def _rings(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    centre = rng.uniform(1, 2, 2)
    return _edge(np.sin(2 * np.pi * np.hypot(x - centre[0], y - centre[1]) / rng.uniform(0.3, 0.5)))


def _clouds(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    waves = sum(
        np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase) * period
        for angle, period, phase in zip(
            rng.uniform(0, 2 * np.pi, 8), rng.uniform(0.2, 1.2, 8), rng.uniform(0, 2 * np.pi, 8), strict=True
        )
    )
    return _edge(np.asarray(waves))


def _edge(values: np.ndarray) -> np.ndarray:
    """Values around 0 as shares from 0 to 1."""
    return 0.5 + 0.5 * np.tanh(2.5 * values)


PATTERNS: dict[str, Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]] = {
    "stripes": _stripes, "checks": _checks, "dots": _dots, "rings": _rings, "clouds": _clouds,
}  # fmt: skip
