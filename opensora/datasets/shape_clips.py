"""Batches of rendered clips: the data of a training step is a function of its number."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from opensora.datasets.clips import Clip, make_clip


class ShapeClips:
    """An endless set of rendered clips; batch n holds clips n * batch_size and on."""

    def __init__(self, num_frames: int, image_size: tuple[int, int], batch_size: int, seed: int = 0) -> None:
        self.num_frames, self.image_size = num_frames, image_size
        self.batch_size, self.seed = batch_size, seed

    def clip(self, index: int) -> Clip:
        """Clip number `index`."""
        return make_clip(self.seed, index, self.num_frames, *self.image_size)

    def videos(self, step: int) -> Tensor:
        """The clips of one step: [B, 3, T, H, W] float32 in [-1, 1]."""
        first = step * self.batch_size
        return to_model([self.clip(index).video for index in range(first, first + self.batch_size)])


def to_model(videos: list[np.ndarray]) -> Tensor:
    """uint8 clips [T, H, W, 3] as one batch [B, 3, T, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
