"""Batches of rendered clips, as a function of the step number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora.datasets.synthetic.render import Clip, make_clip, make_continued_clip
from opensora.errors import ConfigError

CHUNK, CHUNK_LATENTS = 17, 5  # frames per chunk of the video autoencoder, and latent frames per chunk


class ShapeClips:
    """A set of rendered clips, unlimited unless num_clips is given; batch n starts at clip n * batch_size.

    With `continued` the caption describes the second half of a clip; the first half is given as a condition.
    """

    def __init__(
        self, num_frames: int, image_size: tuple[int, int], batch_size: int, seed: int = 0,
        num_clips: int | None = None, continued: bool = False,
    ) -> None:  # fmt: skip
        self.continued = continued
        self.num_frames, self.image_size = num_frames, image_size
        self.batch_size, self.seed, self.num_clips = batch_size, seed, num_clips

    def __str__(self) -> str:
        return "x".join(map(str, (self.num_frames, *self.image_size))) + ("_continued" if self.continued else "")

    def clip(self, index: int) -> Clip:
        """Clip `index`, modulo num_clips."""
        index = index % self.num_clips if self.num_clips else index
        make = make_continued_clip if self.continued else make_clip
        return make(self.seed, index, self.num_frames, *self.image_size)

    def videos(self, step: int) -> Tensor:
        """The clips of one step: [B, 3, T, H, W] float32 in [-1, 1]."""
        first = step * self.batch_size
        return to_model([self.clip(index).video for index in range(first, first + self.batch_size)])


class MixedClips:
    """Clips of several sizes, a set for each; the clips of one step have one size, drawn by the sizes' shares.

    The size is a function of (seed, step). Larger sizes have smaller batches, so that all steps take similar time.
    """

    def __init__(self, sets: Sequence[ShapeClips], shares: Sequence[float], seed: int) -> None:
        self.sets, self.seed = list(sets), seed
        self.shares = np.array(shares) / sum(shares)

    @property
    def period(self) -> int | None:
        """Steps after which `videos` repeats; None for unlimited sets."""
        return sum((one.num_clips or 0) // one.batch_size for one in self.sets) or None

    def pick(self, step: int) -> int:
        """The index in `sets` of a step."""
        if len(self.sets) == 1:
            return 0
        return int(np.random.default_rng((self.seed, step)).choice(len(self.sets), p=self.shares))

    def videos(self, step: int) -> Tensor:
        """The clips of one step: [B, 3, T, H, W] float32 in [-1, 1]."""
        step = step % self.period if self.period else step
        return self.sets[self.pick(step)].videos(step)


def shape_clips(section: dict[str, Any] | None, batch_size: int, seed: int, *needed: str) -> MixedClips:
    """The clips of a `dataset` section. Raises ConfigError for another type, a missing setting or a wrong value.

    `sizes` lists (num_frames, height, width, share[, num_clips]); `num_frames` and `image_size` describe a single size.
    `continued` lists sizes of clips whose first half is given. `batch_size` and `seed` are those of the first size;
    other sizes have seeds of their own, so that they show other scenes.
    """
    section = section or {}
    if section.get("type") != "ShapeClips":
        raise ConfigError(f"dataset type '{section.get('type')}' cannot be trained on yet; use 'ShapeClips'")
    single = ("num_frames", "image_size")
    if section.get("sizes") is None:
        needed = (*single, *needed)
    elif given := [name for name in single if section.get(name) is not None]:
        raise ConfigError(f"dataset has sizes and also {', '.join(given)}; remove one")
    if absent := [name for name in needed if section.get(name) is None]:
        raise ConfigError(f"dataset needs {', '.join(absent)}")
    sizes = section.get("sizes") or [(section["num_frames"], *section["image_size"], 1)]
    continued = section.get("continued") or []
    for listed in (sizes, continued):
        for size in listed if isinstance(listed, list | tuple) else [listed]:
            _check_size(size)
    count, whole = section.get("num_clips"), len(sizes)
    sizes = [*sizes, *continued]
    counts = [size[4] if len(size) > 4 else count for size in sizes]
    sets = [
        ShapeClips(size[0], (size[1], size[2]), _scaled(batch_size, size, sizes[0]), seed + n, counts[n], n >= whole)
        for n, size in enumerate(sizes)
    ]
    return MixedClips(sets, [size[3] for size in sizes], seed)


def _check_size(size: Any) -> None:
    kinds = (int, int, int, int | float, int)
    right = isinstance(size, list | tuple) and len(size) in (4, 5)
    if not right or not all(map(isinstance, size, kinds)) or min(size) <= 0:
        known = "(num_frames, height, width, share) or (num_frames, height, width, share, num_clips)"
        raise ConfigError(f"dataset.sizes lists {known}, all above 0; one is {size!r}")


def _scaled(batch_size: int, size: Sequence[float], first: Sequence[float]) -> int:
    """The batch size of `size` with about as many latent pixels as `batch_size` clips of the `first` size."""
    return max(1, round(batch_size * _latent_pixels(first) / _latent_pixels(size)))


def _latent_pixels(size: Sequence[float]) -> float:
    """Relative number of latent pixels: one frame is one latent frame, longer clips are chunked."""
    return (1 if size[0] == 1 else size[0] * CHUNK_LATENTS / CHUNK) * size[1] * size[2]


def to_model(videos: list[np.ndarray]) -> Tensor:
    """Stacks uint8 clips [T, H, W, 3] into float32 [B, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
