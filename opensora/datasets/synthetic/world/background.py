"""Recognizes the scene and the camera's move of a clip of the world, behind its things."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from opensora.datasets.synthetic.world.motions import PAN, STILL_CAMERA, ZOOM
from opensora.datasets.synthetic.world.render import World, render
from opensora.datasets.synthetic.world.scenes import PICTURES, SCENES

Array = np.ndarray
NEAR_SCENE = 30.0  # mean RGB distance of rows below which a scene is recognized
MOVED = 0.75  # part of the error of a camera that stands still that may be left when the right move is known


def recognize_scene(video: Array) -> str | None:
    """The scene whose rows have the nearest median colours."""
    rows = _rows(video)
    distances = {name: float(np.abs(rows - profile).mean() * 3**0.5) for name, profile in _profiles().items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= NEAR_SCENE else None


def _rows(video: Array, count: int = 16) -> Array:
    """Median colours of horizontal bands around the middle square of the frame, [count, 3]."""
    height, width = video.shape[1:3]
    side = min(height, width)
    top = (height - side) // 2
    bands = np.array_split(video[:, top : top + side], count, axis=1)
    return np.stack([np.median(band.reshape(-1, 3), axis=0) for band in bands])


@cache
def _profiles() -> dict[str, Array]:
    """The bands of each scene without things, over several seeds of its details."""
    empty = {name: [render(World((), name, STILL_CAMERA, seed), 1, 64, 64) for seed in range(6)] for name in SCENES}
    return {name: _rows(np.concatenate(pictures).astype(np.float32)) for name, pictures in empty.items()}


def recognize_camera(video: Array, thing: Array, scene: str | None) -> str | None:
    """How the camera moves, by the move of the first frame's background that predicts the later ones best.

    None on plain scenes, where no move shows. `thing` [T, H, W] is left out of the comparison.
    """
    if scene not in PICTURES or len(video) < 2:
        return None
    errors: dict[str, float] = {}
    for name, pan, zoom in _camera_moves():
        parts = [
            _background_error(video, thing, frame, pan * frame / 16, zoom ** (frame / 16))
            for frame in sorted({min(len(video) - 1, 4), min(len(video) - 1, 8)})
        ]
        errors[name] = min(errors.get(name, np.inf), sum(parts) / len(parts))
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < MOVED * errors[STILL_CAMERA] else STILL_CAMERA


def _camera_moves() -> Iterator[tuple[str, float, float]]:
    """Moves to try, of several strengths: name, pan in short sides and zoom over 17 frames."""
    yield STILL_CAMERA, 0.0, 1.0
    for strength in (0.5, 0.75, 1.0, 1.25):
        yield "pan right", strength * PAN, 1.0
        yield "pan left", -strength * PAN, 1.0
        yield "zoom in", 0.0, ZOOM**strength
        yield "zoom out", 0.0, ZOOM**-strength


def _background_error(video: Array, thing: Array, last: int, pan: float, zoom: float) -> float:
    """The mean squared difference of frame `last` and the first frame moved, where both show background."""
    height, width = video.shape[1:3]
    side = min(height, width)
    x = (np.arange(width) + 0.5 - width / 2) / zoom + pan * side + width / 2 - 0.5
    y = (np.arange(height) + 0.5 - height / 2) / zoom + height / 2 - 0.5
    columns, rows = np.round(x).astype(int), np.round(y).astype(int)
    inside = ((columns >= 0) & (columns < width))[None] & ((rows >= 0) & (rows < height))[:, None]
    columns, rows = columns.clip(0, width - 1), rows.clip(0, height - 1)
    source, hidden = video[0][rows][:, columns], thing[0][rows][:, columns]
    shown = inside & ~hidden & ~thing[last]
    return float(np.square(video[last] - source).mean(-1)[shown].mean()) if shown.any() else np.inf
