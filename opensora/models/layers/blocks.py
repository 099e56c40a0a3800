"""The adaptive-norm transformer block and final layer shared by the PixArt descendants (STDiT, STDiT2, STDiT3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from opensora.models.layers.attention import CrossAttention, Rotation, SelfAttention
from opensora.models.layers.embeddings import Mlp

EPS = 1e-6


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift (adaLN, Peebles & Xie 2022)."""
    return x * (1 + scale) + shift


class SpaceTimeBlock(nn.Module):
    """Self-attention along one axis (patches of a frame, or frames of a patch), cross-attention to text, MLP.

    x [B, T, S, C]; modulation [B, T or 1, 6, C] comes from the timestep, one row per frame where frames differ.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.norm1 = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.attn = SelfAttention(dim, num_heads, qk_norm)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dim)

    def forward(
        self, x: Tensor, modulation: Tensor, y: Tensor, keep: Tensor | None, rotation: Rotation | None = None
    ) -> Tensor:
        rows = (self.scale_shift_table + modulation)[:, :, None].unbind(3)  # 6 x [B, T or 1, 1, C]
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = rows
        x = x + gate_attn * self.attend(modulate(self.norm1(x), shift_attn, scale_attn), rotation)
        x = x + self.cross_attn(x.flatten(1, 2), y, keep).view_as(x)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

    def attend(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """Self-attention of x [B, T, S, C] along its own axis."""
        batch = x.shape[0]
        if self.temporal:
            x = self.attn(x.transpose(1, 2).flatten(0, 1), rotation)  # [B * S, T, C]
            return x.unflatten(0, (batch, -1)).transpose(1, 2)
        return self.attn(x.flatten(0, 1)).unflatten(0, (batch, -1))  # [B * T, S, C]


class Frames(NamedTuple):
    """The time embedding that given frames are modulated with, and which frames are not given but generated."""

    t0: Tensor  # [B, C]
    active: Tensor  # [B, T] bool


class FinalLayer(nn.Module):
    """Tokens x [B, T, S, C] -> patches [B, T, S, patch volume * C_out]; t [B, C] is the time embedding.

    Given frames pass through norm and modulation a second time, with their own t0: the published behaviour.
    """

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.linear = nn.Linear(dim, out_features)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(self, x: Tensor, t: Tensor, frames: Frames | None = None) -> Tensor:
        x = self.modulate(x, t)
        if frames is not None:
            x = torch.where(frames.active[..., None, None], x, self.modulate(x, frames.t0))
        return self.linear(x)

    def modulate(self, x: Tensor, t: Tensor) -> Tensor:
        """x normalised, shifted and scaled by t [B, C]."""
        shift, scale = (self.scale_shift_table + t[:, None])[:, None, None].unbind(3)  # 2 x [B, 1, 1, C]
        return modulate(self.norm_final(x), shift, scale)
