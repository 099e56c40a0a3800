"""Batches of rendered clips: the data of a training step is a function of its number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora.datasets.synthetic.render import Clip, make_clip, make_continued_clip
from opensora.errors import ConfigError

CHUNK, CHUNK_LATENTS = 17, 5  # frames that the video autoencoder takes at once, and what they become


class ShapeClips:
    """A set of rendered clips, endless unless num_clips is given; batch n holds clips n * batch_size and on.

    With `continued` the caption tells the second half of a clip, and the first half is what went before.
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
        """Clip number `index`, counted round where the set has an end."""
        index = index % self.num_clips if self.num_clips else index
        make = make_continued_clip if self.continued else make_clip
        return make(self.seed, index, self.num_frames, *self.image_size)

    def videos(self, step: int) -> Tensor:
        """The clips of one step: [B, 3, T, H, W] float32 in [-1, 1]."""
        first = step * self.batch_size
        return to_model([self.clip(index).video for index in range(first, first + self.batch_size)])


class MixedClips:
    """Clips of several sizes, a set for each; the clips of one step have one size, drawn in the sizes' shares.

    Which one is a function of (seed, step). Batches of larger sizes are smaller, so that all take about equally long.
    """

    def __init__(self, sets: Sequence[ShapeClips], shares: Sequence[float], seed: int) -> None:
        self.sets, self.seed = list(sets), seed
        self.shares = np.array(shares) / sum(shares)

    @property
    def period(self) -> int | None:
        """Steps after which `videos` repeats itself; None for endless sets."""
        return sum((one.num_clips or 0) // one.batch_size for one in self.sets) or None

    def pick(self, step: int) -> int:
        """Which of `sets` a step takes its clips from."""
        if len(self.sets) == 1:
            return 0
        return int(np.random.default_rng((self.seed, step)).choice(len(self.sets), p=self.shares))

    def videos(self, step: int) -> Tensor:
        """The clips of one step: [B, 3, T, H, W] float32 in [-1, 1]."""
        step = step % self.period if self.period else step
        return self.sets[self.pick(step)].videos(step)


def shape_clips(section: dict[str, Any] | None, batch_size: int, seed: int, *needed: str) -> MixedClips:
    """The clips of a `dataset` section; raises ConfigError when it has another type, lacks a setting or is wrong.

    `sizes` lists (num_frames, height, width, share) for several sizes of clips, each with num_clips of its own, or
    with as many as a fifth number says; `num_frames` and `image_size` describe a single one. `continued` lists more, of
    clips that go on after their first half. `batch_size` and `seed` are those of the first size; the others have seeds
    of their own, so that they show other scenes.
    """
    section = section or {}
    if section.get("type") != "ShapeClips":
        raise ConfigError(f"dataset type '{section.get('type')}' cannot be trained on yet; use 'ShapeClips'")
    single = ("num_frames", "image_size")
    if section.get("sizes") is None:
        needed = (*single, *needed)
    elif given := [name for name in single if section.get(name) is not None]:
        raise ConfigError(f"dataset has sizes and also {', '.join(given)}; leave one out")
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
    """How many clips of `size` have about as many latent pixels as `batch_size` clips of the `first` size."""
    return max(1, round(batch_size * _latent_pixels(first) / _latent_pixels(size)))


def _latent_pixels(size: Sequence[float]) -> float:
    """In proportion: a single frame is a latent frame, more frames are grouped."""
    return (1 if size[0] == 1 else size[0] * CHUNK_LATENTS / CHUNK) * size[1] * size[2]


def to_model(videos: list[np.ndarray]) -> Tensor:
    """uint8 clips [T, H, W, 3] as one batch [B, 3, T, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
