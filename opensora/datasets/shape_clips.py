"""Batches of rendered clips: the data of a training step is a function of its number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora.datasets.clips import Clip, make_clip
from opensora.errors import ConfigError


class ShapeClips:
    """A set of rendered clips, endless unless num_clips is given; batch n holds clips n * batch_size and on."""

    def __init__(
        self, num_frames: int, image_size: tuple[int, int], batch_size: int, seed: int = 0, num_clips: int | None = None
    ) -> None:
        self.num_frames, self.image_size = num_frames, image_size
        self.batch_size, self.seed, self.num_clips = batch_size, seed, num_clips

    def clip(self, index: int) -> Clip:
        """Clip number `index`, counted round where the set has an end."""
        index = index % self.num_clips if self.num_clips else index
        return make_clip(self.seed, index, self.num_frames, *self.image_size)

    def videos(self, step: int) -> Tensor:
        """The clips of one step: [B, 3, T, H, W] float32 in [-1, 1]."""
        first = step * self.batch_size
        return to_model([self.clip(index).video for index in range(first, first + self.batch_size)])


def shape_clips(section: dict[str, Any] | None, batch_size: int, seed: int, *needed: str) -> ShapeClips:
    """The clips of a `dataset` section; raises ConfigError when it has another type or lacks a setting."""
    section = section or {}
    if section.get("type") != "ShapeClips":
        raise ConfigError(f"dataset type '{section.get('type')}' cannot be trained on yet; use 'ShapeClips'")
    if absent := [name for name in ("num_frames", "image_size", *needed) if section.get(name) is None]:
        raise ConfigError(f"dataset needs {', '.join(absent)}")
    return ShapeClips(section["num_frames"], section["image_size"], batch_size, seed, section.get("num_clips"))


def to_model(videos: list[np.ndarray]) -> Tensor:
    """uint8 clips [T, H, W, 3] as one batch [B, 3, T, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
