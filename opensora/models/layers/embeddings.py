"""Embeddings of patches, positions, times, sizes and captions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.models.layers.linear import Linear

Size3 = tuple[int, int, int]


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = Linear(in_features, hidden_features)
        self.fc2 = Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def pad_to_multiple(x: Tensor, patch_size: Size3) -> Tensor:
    """x [B, C, T, H, W] with zeros added at the end of T, H and W up to a multiple of the patch."""
    padding = [-size % patch for size, patch in zip(x.shape[2:], patch_size, strict=True)]
    if not any(padding):
        return x
    return F.pad(x, (0, padding[2], 0, padding[1], 0, padding[0]))


class PatchEmbed3D(nn.Module):
    """Latents [B, C_in, T, H, W] as tokens [B, T', S, C]: patches of a frame in row-major order."""

    def __init__(self, patch_size: Size3, in_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, self.patch_size)
        for axis, patch in zip((2, 4, 6), self.patch_size, strict=True):
            x = x.unflatten(axis, (-1, patch))  # [B, C_in, T', pt, H', ph, W', pw]
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(2, 3)  # [B, T', S, C_in * pt * ph * pw]
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


def sinusoid(values: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[cos | sin] features of `values` [N] in float32: [N, dim], an odd dim ends with a zero column."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, device=values.device, dtype=torch.float32) / half)
    angles = values[:, None].float() * freqs
    return F.pad(torch.cat((angles.cos(), angles.sin()), dim=-1), (0, dim % 2))


class TimestepEmbedder(nn.Module):
    """Scalars [N] -> [N, C]: sinusoids in float32, then a two-layer MLP with SiLU."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            Linear(frequency_embedding_size, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoid(t, self.frequency_embedding_size).to(self.mlp[0].weight.dtype))


class SizeEmbedder(TimestepEmbedder):
    """Scalars s [b] or [b, n] -> [batch_size, n * C]: each embedded by itself, the whole of s tiled to the batch."""

    @classmethod
    def third(cls, hidden_size: int) -> SizeEmbedder:
        """One of the three (height, width, ratio) that fill the model's width together."""
        if hidden_size % 3:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of 3: it holds height, width and ratio")
        return cls(hidden_size // 3)

    def forward(self, s: Tensor, batch_size: int | None = None) -> Tensor:
        s = s[:, None] if s.ndim == 1 else s
        s = tile(s, batch_size or len(s))
        return super().forward(s.flatten()).unflatten(0, s.shape).flatten(1)


def normal_rows(rows: int, width: int) -> Tensor:
    """[rows, width] of normal values with variance 1 / width.

    Without values on the meta device, where drawing them would import torch._dynamo, for seconds.
    """
    empty = torch.empty(rows, width)
    return empty if empty.is_meta else torch.randn(rows, width) / width**0.5


def tile(x: Tensor, batch_size: int) -> Tensor:
    """x repeated whole along its first axis until it has `batch_size` rows (x0 x1 x0 x1 ...)."""
    if len(x) == batch_size:
        return x
    if batch_size % len(x):
        raise ValueError(f"{len(x)} rows cannot be tiled to a batch of {batch_size}")
    return x.repeat(batch_size // len(x), *(1,) * (x.ndim - 1))


class CaptionEmbedder(nn.Module):
    """Text features y [B, 1, L, C_in] -> [B, 1, L, C]; `y_embedding` [token_num, C_in] is the unconditional text."""

    y_embedding: Tensor

    def __init__(self, in_channels: int, hidden_size: int, token_num: int) -> None:
        super().__init__()
        self.y_proj = Mlp(in_channels, hidden_size, hidden_size)
        self.register_buffer("y_embedding", normal_rows(token_num, in_channels))

    def null_like(self, y: Tensor) -> Tensor:
        """The unconditional text [1, 1, L, C_in] of the length of `y` [B, 1, L, C_in]."""
        if y.shape[2] > len(self.y_embedding):
            raise ValueError(f"text of {y.shape[2]} tokens is longer than the model's {len(self.y_embedding)}")
        return self.y_embedding[None, None, : y.shape[2]].to(y)

    def forward(self, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """`drop` [B] bool replaces the text of those samples by the unconditional one (classifier-free training)."""
        if drop is not None:
            y = torch.where(drop[:, None, None, None], self.null_like(y), y)
        return self.y_proj(y)


class LabelEmbedder(nn.Module):
    """Classes y [B] int64 -> [B, C]; with `has_null` one more row, of index num_classes, is the unconditional class."""

    def __init__(self, num_classes: int, hidden_size: int, has_null: bool) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + has_null, hidden_size)

    def null_like(self, y: Tensor) -> Tensor:
        """The unconditional class, as often as there are classes in `y`."""
        if len(self.embedding_table.weight) == self.num_classes:
            raise ValueError("class_dropout_prob is 0, so the model has no unconditional class; use guidance scale 1")
        return torch.full_like(y, self.num_classes)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def sincos_1d(dim: int, positions: Tensor) -> Tensor:
    """[sin | cos] features of `positions` [N], computed in float64: [N, dim] float32 (DiT, Peebles & Xie 2022)."""
    freqs = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64, device=positions.device) / (dim / 2))
    angles = positions.double()[:, None] * freqs
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


def sincos_2d(dim: int, height: int, width: int, scale: float = 1.0, base_size: int | None = None) -> Tensor:
    """Fixed positions of a height x width grid, row-major: [height * width, dim] float32, the width's half first.

    Positions are divided by `scale` and, with base_size, multiplied by base_size / grid side (PixArt-alpha).
    """
    rows, columns = (
        torch.arange(side, dtype=torch.float64) / scale * (1.0 if base_size is None else base_size / side)
        for side in (height, width)
    )
    return torch.cat(
        (sincos_1d(dim // 2, columns.repeat(height)), sincos_1d(dim // 2, rows.repeat_interleave(width))), dim=-1
    )


def position_embedding_2d(
    dim: int, height: int, width: int, scale: float | Tensor = 1.0,
    base_size: int | None = None, device: torch.device | None = None,
) -> Tensor:  # fmt: skip
    """`sincos_2d` computed in float32 on `device`, for models that take any size of video."""
    quarter = dim // 4
    freqs = 1.0 / 10000 ** (torch.arange(quarter, device=device, dtype=torch.float32) / quarter)

    def axis(length: int) -> Tensor:
        positions = torch.arange(length, device=device, dtype=torch.float32) / scale
        if base_size is not None:
            positions = positions * (base_size / length)
        angles = positions[:, None] * freqs
        return torch.cat((angles.sin(), angles.cos()), dim=-1)  # [length, dim / 2]

    rows, columns = axis(height), axis(width)
    grid = torch.cat((columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)), dim=-1)
    return grid.flatten(0, 1)
