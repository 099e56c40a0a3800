"""Flaws of a clip of the world that a person sees: colours that waver, shapes that melt, flicker, soft edges.

Each is the worst over the frames, not the mean.
"""

from __future__ import annotations

import numpy as np

from opensora.datasets.synthetic.flaws import Flaws, has_other_colour
from opensora.datasets.synthetic.world.motions import STILL_CAMERA
from opensora.datasets.synthetic.world.palette import COLOURS
from opensora.datasets.synthetic.world.recognize import (
    Recognized,
    Track,
    around,
    main_colour,
    moments,
    template_fits,
)

Array = np.ndarray


def find_flaws(video: Array, seen: Recognized) -> Flaws | None:
    """The flaws of the clip `video`, uint8 [T, H, W, 3], in which `seen` was recognized; None without a thing."""
    if seen.thing is None or seen.colour is None or seen.track is None:
        return None
    video = video.astype(np.float32)
    drawn = np.stack([_drawn(seen.thing, seen.track, n, *video.shape[1:3]) for n in range(len(seen.track.frames))])
    shown = video[seen.track.frames]
    inner = _shrink(drawn > 0.99)
    other = has_other_colour(shown, seen.colour, COLOURS)
    off = [float(pixels[i].mean()) if i.any() else 0.0 for pixels, i in zip(other, inner, strict=True)]
    best = template_fits(drawn)[3].max((1, 2))  # how well the drawing itself fits at this size
    outline = 1 - float((seen.track.fit / best).min())
    return Flaws(max(off), max(outline, 0.0), _flicker(video, seen), _edge(shown, drawn))


def _drawn(thing: str, track: Track, number: int, height: int, width: int) -> Array:
    """How far each pixel shows the thing's main colour, if it is drawn where the track says, [H, W]."""
    side = min(height, width)
    cx, cy, _ = moments(thing)
    radius, angle = float(track.radius[number]), float(track.angle[number])
    x = ((np.arange(width) + 0.5 - width / 2) / side - track.x[number])[None] / radius
    y = ((np.arange(height) + 0.5 - height / 2) / side - track.y[number])[:, None] / radius
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    mirror = -1 if track.mirrored[number] else 1
    return main_colour(thing, mirror * u + cx, v + cy, 1 / (radius * side))


def _shrink(mask: Array, times: int = 2) -> Array:
    for _ in range(times):
        padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
        mask = mask & padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    return mask


def _flicker(video: Array, seen: Recognized) -> float:
    """The largest change of a block of the background between neighbours; 0 where the camera moves."""
    if seen.camera not in (None, STILL_CAMERA) or len(video) < 2 or seen.track is None:
        return 0.0
    height, width = (size // 8 * 8 for size in video.shape[1:3])
    covered = around(seen.track, np.zeros(video.shape[:3], bool))
    covered[np.setdiff1d(np.arange(len(video)), seen.track.frames)] = True
    blocks = video[:, :height, :width].reshape(len(video), height // 8, 8, width // 8, 8, 3).mean((2, 4, 5))
    hidden = covered[:, :height, :width].reshape(len(video), height // 8, 8, width // 8, 8).any((2, 4))
    near = np.pad(hidden, ((0, 0), (1, 1), (1, 1)))
    shifted = [near[:, dy : dy + height // 8, dx : dx + width // 8] for dy in range(3) for dx in range(3)]
    free = ~np.logical_or.reduce(shifted)
    both = free[1:] & free[:-1]
    change = np.abs(np.diff(blocks, axis=0))[both]
    return float(change.max()) if change.size else 0.0


def _edge(shown: Array, drawn: Array) -> float:
    """The steepness of the outline in the softest frame, relative to the contrast across it."""
    worst = np.inf
    for frame, coverage in zip(shown, drawn, strict=True):
        inside, outside = coverage > 0.99, coverage < 0.01
        if not inside.any() or not outside.any():
            continue
        inner = frame[inside].mean(0)
        towards = inner - frame[outside].mean(0)
        level = (frame - inner) @ towards / max(float(towards @ towards), 1.0) + 1
        rise = np.hypot(*np.gradient(level))
        ideal = np.hypot(*np.gradient(coverage))
        steep = ideal > 0.35
        if steep.any():
            worst = min(worst, float(np.median(rise[steep] / ideal[steep])))
    return worst if np.isfinite(worst) else 0.0
