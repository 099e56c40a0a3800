"""Flaws of a clip of moving shapes that a person sees: wavering colours, melting shapes, a flickering background.

Each is the worst over the frames, not the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from opensora.datasets.synthetic.measure import border_colour, draw_alike, find_object, overlap, reduce_size, spread
from opensora.datasets.synthetic.render import COLOURS

OFF_COLOUR = 90.0  # RGB distance at which a pixel of the object is not of its colour, whatever else it resembles
INNER, NEAR = 0.99, 0.02  # coverage of a pixel that lies wholly within the shape, and of one that it touches
WAVERS, MELTS, FLICKERS = 0.05, 0.2, 10.0  # above these a flaw is visible


class Flaws(NamedTuple):
    """The worst frame of each kind.

    off_colour: part of the object's inner pixels that are nearer to another colour, or far from their own
    outline: part of the object by which its outline differs from that of its perfect shape
    flicker: change of an 8x8 block of the background from one frame to the next, in grey levels of 255
    edge: steepest rise of brightness across the outline, as a part of a hard edge's; None where it is not measured
    """

    off_colour: float
    outline: float
    flicker: float
    edge: float | None = None

    @property
    def wavers(self) -> bool:
        return self.off_colour > WAVERS

    @property
    def melts(self) -> bool:
        return self.outline > MELTS

    @property
    def flickers(self) -> bool:
        return self.flicker > FLICKERS


def find_flaws(video: np.ndarray, shape: str, colour: str) -> Flaws:
    """The flaws of the clip `video`, uint8 [T, H, W, 3], whose object should have this shape and colour.

    A frame without an object has the worst outline, 1.
    """
    video = reduce_size(video)
    coverage = find_object(video, border_colour(video))[0]
    off, outline = [], []
    for frame, covered in zip(video, coverage, strict=True):
        if covered.sum() < 1:
            outline.append(1.0)
            continue
        perfect = draw_alike(shape, covered)
        outline.append(1 - overlap(covered, perfect))
        inner = _shrink(perfect > INNER)
        off.append(float(has_other_colour(frame[inner], colour, COLOURS).mean()) if inner.any() else 0.0)
    return Flaws(max(off, default=0.0), max(outline), _flicker(video, coverage))


def has_other_colour(pixels: np.ndarray, colour: str, palette: Mapping[str, tuple[int, int, int]]) -> np.ndarray:
    """Which of `pixels`, RGB [..., 3], are nearer to another colour of `palette`, or further than OFF_COLOUR; [...]."""
    distances = np.stack([np.linalg.norm(pixels - np.array(rgb, np.float32), axis=-1) for rgb in palette.values()])
    own = distances[list(palette).index(colour)]
    return (own > distances.min(0)) | (own > OFF_COLOUR)


def _shrink(mask: np.ndarray) -> np.ndarray:
    """The pixels of `mask` [H, W] whose four neighbours it has too."""
    return spread(~mask[None])[0] == 0


def _flicker(video: np.ndarray, coverage: np.ndarray) -> float:
    """The largest change of a block that the object is not near, from one frame to the next."""
    near = spread(spread(coverage > NEAR))
    blocks, taken = _blocks(video).mean((2, 4)), _blocks(near[..., None]).max((2, 4))[..., 0]
    free = ~(taken[1:] | taken[:-1])
    return float(np.abs(np.diff(blocks, axis=0))[free].max()) if free.any() else 0.0


def _blocks(video: np.ndarray) -> np.ndarray:
    """[T, H, W, C] in blocks of 8x8, [T, H/8, 8, W/8, 8, C]; what is over at the right and below is cut off."""
    frames, height, width, channels = video.shape
    video = video[:, : height // 8 * 8, : width // 8 * 8]
    return video.reshape(frames, height // 8, 8, width // 8, 8, channels)
