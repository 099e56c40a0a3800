"""Transformers built for one latent size, with sine-cosine positions in buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opensora.models.layers.embeddings import sincos_1d, sincos_2d
from opensora.models.layers.transformer import PatchTransformer


class FixedPositions(PatchTransformer):
    """A model built for one latent size, `input_size` (T, H, W).

    The buffers of positions are computed from the configuration; `positions` recomputes them for a checkpoint that has
    those of another size, or none.
    """

    pos_embed: Tensor  # those that a model has
    pos_embed_spatial: Tensor
    pos_embed_temporal: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        size = self.input_size = tuple(config["input_size"])
        if None in size or any(side % patch for side, patch in zip(size, self.patch_size, strict=True)):
            raise ValueError(f"input_size {size} must be (frames, height, width), multiples of {self.patch_size}")

    def positions(self) -> dict[str, Tensor]:
        """The position buffers by name: [1, S, C] of a frame's patches and [1, T', C] of the frames."""
        raise NotImplementedError

    def grid_positions(self, scale: float = 1.0, base_size: int | None = None) -> Tensor:
        """[1, S, C] of the patches of a frame; see `sincos_2d`."""
        return sincos_2d(self.hidden_size, *self.token_grid(self.input_size)[1:], scale, base_size)[None]

    def frame_positions(self, scale: float = 1.0) -> Tensor:
        """[1, T', C] of the frames, divided by `scale`."""
        frames = torch.arange(self.token_grid(self.input_size)[0], dtype=torch.float64)
        return sincos_1d(self.hidden_size, frames / scale)[None]

    def register_positions(self) -> None:
        """Registers the positions as buffers."""
        for name, value in self.positions().items():
            self.register_buffer(name, value)

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens [B, T', S, C] of x [B, C, T, H, W], without positions."""
        if tuple(x.shape[2:]) != self.input_size:
            raise ValueError(f"{type(self).__name__} was built for latents {self.input_size}, not {tuple(x.shape[2:])}")
        return self.x_embedder(x.to(self.dtype))
