"""One attention function and the two modules (self, cross) that every transformer of this package uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.models.layers.linear import Linear

Pair = tuple[Tensor, Tensor]  # keys, values: [N, M, H, D] each
MOST_HEADS = 2**15  # of one call: kernels count them in 16 bits
MOST_SCORES = 2**12  # of a head whose scores are kept


def attention(q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None = None) -> Tensor:
    """Softmax attention (Vaswani et al. 2017), heads joined: [N, L, H * D].

    q [N, L, H, D]; k, v [N, M, H, D]; text_mask [N, M] bool is True for real tokens (None: all are real).
    """
    if q.shape[2] > MOST_HEADS:
        parts = zip(q.split(MOST_HEADS, 2), k.split(MOST_HEADS, 2), v.split(MOST_HEADS, 2), strict=True)
        return torch.cat([attention(*part, text_mask) for part in parts], dim=-1)
    mask = None if text_mask is None else text_mask[:, None, None, :]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [N, H, L, D]
    few = q.shape[2] * k.shape[2] <= MOST_SCORES
    kept = few and torch.is_grad_enabled() and q.is_cpu
    compute = kept_scores if kept else F.scaled_dot_product_attention
    return compute(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def kept_scores(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    """As `scaled_dot_product_attention`, but keeps the scores: on a CPU its backward pass is slow for few tokens."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=dtype).to(v.dtype) @ v


def rotation_table(freqs: Tensor, length: int) -> Tensor:
    """cos and sin of the rotary angles of positions 0..length-1 (Su et al. 2021): [L, D / 2, 2] float32.

    freqs [D / 2] holds the angle per position of each pair.
    """
    positions = torch.arange(length, device=freqs.device, dtype=torch.float32)
    angles = positions[:, None] * freqs.float()
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [N, L, ..., D] rotated by its position: pair (a, b) -> (a cos - b sin, b cos + a sin), computed in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = along_tokens(rotation, x).unbind(-1)
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


def along_tokens(rotation: Tensor, x: Tensor) -> Tensor:
    """The rotations [L, D / 2, 2] reshaped to broadcast over x [N, L, ..., D]: [L, 1, ..., D / 2, 2]."""
    return rotation.unflatten(0, (-1, *(1,) * (x.ndim - 3)))


class RotaryFrequencies(nn.Module):
    """The frozen parameter `rope.freqs` [head_dim / 2]; kept in float32 whatever the model's dtype."""

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"rotary positions need an even head size; hidden_size / num_heads is {head_dim}")
        freqs = torch.empty(head_dim // 2)
        if not freqs.is_meta:  # where arithmetic would import torch._dynamo, for seconds
            freqs = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        self.freqs = nn.Parameter(freqs, requires_grad=False)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, the quotient in float32 inside (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class SelfAttention(nn.Module):
    """Multi-head self-attention over x [N, L, C], with optional q/k RMS norm and rotary positions.

    Of x [N, L, S, C], the S sequences are computed side by side like heads, without a transposition.
    qk_norm_legacy rotates before it normalises (the order of Open-Sora 1.1.0).
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, qk_norm_legacy: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk_norm_legacy = qk_norm_legacy
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        if x.shape[1] == 1 and not torch.is_grad_enabled():  # a single token attends to itself
            return self.proj(self.compress(self.values(x)))
        q, k, v = (part.flatten(2, -2) for part in self.heads(x, rotation))
        return self.proj(attention(q, k, v).view(x.shape))

    def heads(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, ...]:
        """Queries, keys and values of x [N, L, ..., C], each [N, L or M, ..., H, D], normalised and rotated."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (q, self.compress(k), self.compress(v)))
        if rotation is None:
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.qk_norm_legacy:
            q, k = self.q_norm(rotate(q, rotation)), self.k_norm(rotate(k, rotation))
        else:
            q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        return q, k, v

    def values(self, x: Tensor) -> Tensor:
        """The values [N, L, ..., C] of x, heads joined."""
        layer, first = self.qkv, 2 * x.shape[-1]
        return layer.outputs(x, first) if isinstance(layer, Linear) else layer(x)[..., first:]

    def compress(self, x: Tensor) -> Tensor:
        """Keys or values [N, L, C] as [N, M, C]; here M = L. Subclasses may attend to fewer."""
        return x


class CrossAttention(nn.Module):
    """Tokens x [B, N, C] attend to the text y [B, M, C]; text_mask [B, M] bool is True for real text tokens.

    In place of y its keys and values may be given, which are the same in all steps.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = Linear(dim, dim)
        self.kv_linear = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor | Pair, text_mask: Tensor | None = None) -> Tensor:
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1))
        return self.proj(attention(q, *(self.read(y) if isinstance(y, Tensor) else y), text_mask))

    def read(self, y: Tensor) -> Pair:
        """Keys and values of the text."""
        return self.kv_linear(y).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)


def unpack_text(packed: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Packed text [1, sum(lengths), C] as (y [B, max(lengths), C] padded with zeros, mask [B, max(lengths)])."""
    y = nn.utils.rnn.pad_sequence(packed[0].split(lengths), batch_first=True)
    positions = torch.arange(y.shape[1], device=y.device)
    return y, positions < torch.tensor(lengths, device=y.device)[:, None]
