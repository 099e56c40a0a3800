"""Transformer blocks and the final layer with adaptive norms (adaLN): the timestep modulates attention and MLP.

Tokens are x [B, T, S, C]: batch, frames, patches of a frame, channels. Modulation has rows of C channels: shift, scale
and gate of the attention, then of the MLP.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.models.layers.attention import CrossAttention, Pair, SelfAttention
from opensora.models.layers.embeddings import Mlp, normal_rows
from opensora.models.layers.linear import Linear

EPS = 1e-6
Axis = Literal["space", "time", "both"]


class Frames(NamedTuple):
    """The time embedding of given (clean) frames, and which frames are generated."""

    t0: Tensor  # [B, C]
    active: Tensor  # [B, T] bool


class Modulation(NamedTuple):
    """The modulation of the tokens by the timestep, in the blocks and in the final layer."""

    blocks: Tensor  # [B, T or 1, 6, C]; one row per frame if some frames are given
    final: Tensor  # [B, C]
    frames: Frames | None  # None if all frames are generated
    generated: Tensor  # [B, 1, 6, C], the rows of `blocks` for generated frames


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift (adaLN, Peebles & Xie 2022); in one pass if a single row serves all tokens."""
    size, scale = x.shape[-1:], 1 + scale
    if scale.numel() == shift.numel() == x.shape[-1] and x.dtype == scale.dtype:
        return F.layer_norm(x, size, scale.flatten(), shift.flatten(), EPS)
    return torch.addcmul(shift, F.layer_norm(x, size, eps=EPS), scale)


def along(axis: Axis, module: nn.Module, x: Tensor, rotation: Tensor | None = None) -> Tensor:
    """`module` over x [B, T, S, C] as sequences of patches, [B * T, S, C]; of frames, [B, T, S, C]; or of both."""
    if axis == "time":
        return module(x, rotation)
    first = 0 if axis == "space" else 1
    return module(x.flatten(first, first + 1), rotation).view(x.shape)


class Block(nn.Module):
    """Self-attention along one axis and an MLP, each normalised, modulated and gated."""

    def __init__(self, dim: int, attn: SelfAttention, mlp_ratio: float, axis: Axis) -> None:
        super().__init__()
        self.axis: Axis = axis
        self.attn = attn
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dim)

    def self_attend(self, x: Tensor, rows: tuple[Tensor, ...], rotation: Tensor | None = None) -> Tensor:
        """x plus its gated self-attention, modulated by the first three of `rows`."""
        return torch.addcmul(x, rows[2], along(self.axis, self.attn, modulated(x, *rows[:2]), rotation))

    def feed_forward(self, x: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """x plus its gated MLP, modulated by the last three of `rows`."""
        return torch.addcmul(x, rows[-1], self.mlp(modulated(x, *rows[-3:-1])))


class TextBlock(Block):
    """The block of PixArt-alpha (Chen et al. 2023): cross-attention to text before the MLP, one shared modulation.

    Every block adds its own table to the modulation [B, T or 1, 6, C] that all blocks share (adaLN-single).
    """

    def __init__(self, dim: int, attn: SelfAttention, mlp_ratio: float, axis: Axis) -> None:
        super().__init__(dim, attn, mlp_ratio, axis)
        self.scale_shift_table = nn.Parameter(normal_rows(6, dim))
        self.cross_attn = CrossAttention(dim, attn.num_heads)

    def forward(self, x: Tensor, modulation: Tensor, y: Tensor | Pair, text_mask: Tensor | None) -> Tensor:
        rows = rows_of(self.scale_shift_table + modulation)
        return self.feed_forward(self.attend_text(self.self_attend(x, rows), y, text_mask), rows)

    def attend_text(self, x: Tensor, y: Tensor | Pair, text_mask: Tensor | None) -> Tensor:
        """x plus its cross-attention to the text y [B, L, C], or to its keys and values; text_mask [B, L] bool."""
        return x + self.cross_attn(x.flatten(1, 2), y, text_mask).view_as(x)


class TemporalTextBlock(TextBlock):
    """A TextBlock along frames, with rotary positions. Its `forward` is compiled apart from that of other blocks."""

    def __init__(self, dim: int, attn: SelfAttention, mlp_ratio: float) -> None:
        super().__init__(dim, attn, mlp_ratio, "time")

    def forward(
        self, x: Tensor, modulation: Tensor, y: Tensor | Pair, text_mask: Tensor | None, rotation: Tensor | None = None
    ) -> Tensor:
        rows = rows_of(self.scale_shift_table + modulation)
        return self.feed_forward(self.attend_text(self.self_attend(x, rows, rotation), y, text_mask), rows)


def rows_of(modulation: Tensor) -> tuple[Tensor, ...]:
    """[B, T or 1, n, C] as n tensors [B, T or 1, 1, C] that broadcast over the patches of a frame."""
    return modulation[:, :, None].unbind(3)


class FinalLayer(nn.Module):
    """Tokens x [B, T, S, C] -> patches [B, T, S, patch volume * C_out]; t [B, C] is the time embedding.

    Given frames pass through norm and modulation a second time, with their own t0: the published behaviour.
    """

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.linear = Linear(dim, out_features)
        self.scale_shift_table = nn.Parameter(normal_rows(2, dim))

    def forward(self, x: Tensor, t: Tensor, frames: Frames | None = None) -> Tensor:
        x = self.modulate(x, t)
        if frames is not None:
            x = torch.where(frames.active[..., None, None], x, self.modulate(x, frames.t0))
        return self.linear(x)

    def modulate(self, x: Tensor, t: Tensor) -> Tensor:
        """x normalised, shifted and scaled by t [B, C]."""
        return modulated(x, *rows_of((self.scale_shift_table + t[:, None])[:, None]))
