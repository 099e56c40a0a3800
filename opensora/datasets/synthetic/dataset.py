"""Batches of rendered clips, as a function of the step number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from opensora.datasets.synthetic import render
from opensora.datasets.synthetic.world import clips as world
from opensora.errors import ConfigError

CHUNK, CHUNK_LATENTS = 17, 5  # frames per chunk of the video autoencoder, and latent frames per chunk


class RenderedClips:
    """A set of rendered clips, unlimited unless num_clips is given; batch n starts at clip n * batch_size.

    With `continued` the caption describes the second half of a clip; the first half is given as a condition.
    With `crop` (height, width) an autoencoder sees a random window of each clip.
    """

    make: ClassVar[Callable[..., Any]]  # (seed, index, num_frames, height, width) -> clip with `video` and `text`
    make_continued: ClassVar[Callable[..., Any]]
    make_altered: ClassVar[Callable[..., np.ndarray] | None] = None  # frames with another color or shape
    slow: ClassVar[bool] = False  # whether worker processes should render

    def __init__(
        self, num_frames: int, image_size: tuple[int, int], batch_size: int, seed: int = 0,
        num_clips: int | None = None, continued: bool = False, crop: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.continued, self.crop = continued, crop
        self.num_frames, self.image_size = num_frames, image_size
        self.batch_size, self.seed, self.num_clips = batch_size, seed, num_clips

    def __str__(self) -> str:
        return "x".join(map(str, (self.num_frames, *self.image_size))) + ("_continued" if self.continued else "")

    def identity(self) -> dict[str, Any]:
        """What the clips are a function of."""
        made: dict[str, Any] = {"frames": self.num_frames, "image_size": self.image_size, "seed": self.seed}
        made |= {"continued": True} if self.continued else {}
        return made if type(self) is ShapeClips else {"type": type(self).__name__, **made}

    def unlimited(self) -> RenderedClips:
        """The same set without an end."""
        return type(self)(self.num_frames, self.image_size, self.batch_size, self.seed, None, self.continued)

    def clip(self, index: int) -> Any:
        """Clip `index`, modulo num_clips."""
        index = index % self.num_clips if self.num_clips else index
        make = self.make_continued if self.continued else self.make
        return make(self.seed, index, self.num_frames, *self.image_size)

    @property
    def alterable(self) -> bool:
        """Whether `altered` can be called; not for continued clips, whose captions describe one half."""
        return self.make_altered is not None and not self.continued

    def altered(self, index: int) -> np.ndarray:
        """The frames of clip `index` with another color or shape, uint8 [T, H, W, 3]."""
        assert self.make_altered is not None and not self.continued
        index = index % self.num_clips if self.num_clips else index
        return self.make_altered(self.seed, index, self.num_frames, *self.image_size)

    def window(self, index: int) -> np.ndarray:
        """The frames of clip `index`, uint8 [T, H, W, 3], or those of a window of `crop` at a random place of it."""
        video = self.clip(index).video
        if self.crop is None:
            return video
        rng = np.random.default_rng((self.seed, index, 9))
        top, left = (int(rng.integers(have - want + 1)) for have, want in zip(self.image_size, self.crop, strict=True))
        return video[:, top : top + self.crop[0], left : left + self.crop[1]]

    def windows(self, step: int) -> np.ndarray:
        """The windows of one step, uint8 [B, T, H, W, 3]."""
        return np.stack([self.window(index) for index in self._indices(step)])

    def texts(self, step: int) -> list[str]:
        """The captions of the clips of one step."""
        return [self.clip(index).text for index in self._indices(step)]

    def _indices(self, step: int) -> range:
        return range(step * self.batch_size, (step + 1) * self.batch_size)


class ShapeClips(RenderedClips):
    """Clips of a moving shape on a plain background."""

    make = staticmethod(render.make_clip)
    make_continued = staticmethod(render.make_continued_clip)
    make_altered = staticmethod(render.make_altered_clip)


class WorldClips(RenderedClips):
    """Clips of the drawn world."""

    make = staticmethod(world.make_clip)
    make_continued = staticmethod(world.make_continued_clip)
    slow = True


TYPES: dict[str, type[RenderedClips]] = {"ShapeClips": ShapeClips, "WorldClips": WorldClips}


class MixedClips:
    """Clips of several sizes, a set for each; the clips of one step have one size, drawn by the sizes' shares.

    The size is a function of (seed, step). Larger sizes have smaller batches, so that all steps take similar time.
    """

    def __init__(self, sets: Sequence[RenderedClips], shares: Sequence[float], seed: int) -> None:
        self.sets, self.seed = list(sets), seed
        self.shares = np.array(shares) / sum(shares)

    @property
    def slow(self) -> bool:
        """Whether worker processes should render."""
        return any(one.slow for one in self.sets)

    @property
    def period(self) -> int | None:
        """Steps after which `videos` repeats; None for unlimited sets."""
        return sum((one.num_clips or 0) // one.batch_size for one in self.sets) or None

    def pick(self, step: int) -> int:
        """The index in `sets` of a step."""
        if len(self.sets) == 1:
            return 0
        return int(np.random.default_rng((self.seed, step)).choice(len(self.sets), p=self.shares))

    def windows(self, step: int) -> np.ndarray:
        """The clips of one step, uint8 [B, T, H, W, 3]."""
        return self.of_step(step).windows(self._position(step))

    def texts(self, step: int) -> list[str]:
        """The captions of the clips of one step."""
        return self.of_step(step).texts(self._position(step))

    def of_step(self, step: int) -> RenderedClips:
        """The set that the clips of a step are from."""
        return self.sets[self.pick(self._position(step))]

    def _position(self, step: int) -> int:
        return step % self.period if self.period else step

    def videos(self, step: int) -> Tensor:
        """The clips of one step: [B, 3, T, H, W] float32 in [-1, 1]."""
        return to_model(self.windows(step))


def rendered_clips(section: dict[str, Any] | None, batch_size: int, seed: int, *needed: str) -> MixedClips:
    """The clips of a `dataset` section. Raises ConfigError for another type, a missing setting or a wrong value.

    `sizes` lists (num_frames, height, width, share[, num_clips]); `num_frames` and `image_size` describe a single size.
    `continued` lists sizes of clips whose first half is given. `batch_size` and `seed` are those of the first size;
    other sizes have seeds of their own, so that they show other scenes.
    """
    section = section or {}
    kind = TYPES.get(str(section.get("type")))
    if kind is None:
        raise ConfigError(f"dataset type '{section.get('type')}' cannot be trained on yet; use {' or '.join(TYPES)}")
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
    crop = section.get("crop")
    if crop and any(side > have for size in (*sizes, *continued) for side, have in zip(crop, size[1:3], strict=True)):
        raise ConfigError(f"dataset.crop {tuple(crop)} is larger than the clips; name a window that fits in every size")
    count, whole = section.get("num_clips"), len(sizes)
    sizes = [*sizes, *continued]
    counts = [size[4] if len(size) > 4 else count for size in sizes]
    sets = [
        kind(size[0], (size[1], size[2]), _scaled(batch_size, size, sizes[0]), seed + n, counts[n], n >= whole, crop)
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


def to_model(videos: Sequence[np.ndarray] | np.ndarray, device: torch.device | None = None) -> Tensor:
    """Stacks uint8 clips [T, H, W, 3] into float32 [B, 3, T, H, W] in [-1, 1]."""
    stacked = videos if isinstance(videos, np.ndarray) else np.stack(videos)
    return torch.from_numpy(stacked).to(device=device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
