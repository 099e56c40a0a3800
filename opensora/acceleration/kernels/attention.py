"""Attention for inference on a CPU, in fewer passes over memory than PyTorch's kernels where sequences are short.

In float32; queries and keys are normalised and rotated together in bfloat16, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora.acceleration.kernels.linear import DTYPES, needs_gradients, suits
from opensora.acceleration.replace_modules import recast
from opensora.models.layers import attention as plain
from opensora.models.layers.attention import Kernels
from opensora.models.pixart.pixart_sigma import CompressedAttention

MAX_ELEMENTWISE_TOKENS = 8  # up to here element-wise products are faster than matrix products
MAX_MATRIX_TOKENS = 16  # up to here matrix products are faster than the fused kernel, whose blocks stay mostly empty
IN_CACHE = 2**20  # values that stay in the cache between two passes
MAX_FOLDED = 2**18  # values that a folded text may have in each block


def cpu_attention_module(module: nn.Module) -> nn.Module:
    """The CPU version of a self- or cross-attention; other modules are returned."""
    kind = CPU_MODULES.get(type(module))
    return module if kind is None else recast(module, kind)


def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Softmax attention, heads joined: [N, L, H * D]. Without fused kernels where few tokens meet in float32."""
    if keep is None and suits(q, k) and not needs_gradients(q, k, v):
        tokens = max(q.shape[1], k.shape[1])
        if tokens <= MAX_MATRIX_TOKENS and q.numel() <= IN_CACHE:
            return _elementwise(q, k, v) if tokens <= MAX_ELEMENTWISE_TOKENS else _by_matrices(q, k, v)
    return plain.attention(q, k, v, keep)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [N, L, ..., D] rotated by its position as complex pairs; rotation [L, D / 2, 2] holds cos and sin."""
    if not suits(x, rotation):
        return plain.rotate(x, rotation)
    pairs, angles = (torch.view_as_complex(one) for one in (x.unflatten(-1, (-1, 2)), plain.along_tokens(rotation, x)))
    return torch.view_as_real(pairs * angles).flatten(-2)


def _by_matrices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch = len(q)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))  # [N * H, L, D]
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)


def _elementwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q[:, :, None] * k[:, None]).sum(dim=-1) * q.shape[-1] ** -0.5  # [N, L, M, H]
    return (scores.softmax(dim=2)[..., None] * v[:, None]).sum(dim=2).flatten(2)


class CpuSelfAttention(plain.SelfAttention):
    """Self-attention that normalises and rotates queries and keys together."""

    kernels = Kernels(attention, rotate)

    def heads(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, ...]:
        norm = self.q_norm
        if (
            self.qk_norm_legacy
            or not isinstance(norm, plain.RMSNorm)
            or needs_gradients(x, *self.parameters())
            or not suits(x, norm.weight, DTYPES)
        ):
            return super().heads(x, rotation)
        both, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).split((2, 1), dim=-3)  # [N, L, ..., 2, H, D]
        made = both.new_empty(2, *v.squeeze(-3).shape).movedim(0, -3)  # all queries, then all keys
        weight = torch.stack((norm.weight, self.k_norm.weight)).float()[:, None]
        _normalise(both, weight, norm.eps, rotation, made)
        return *made.unbind(-3), v.squeeze(-3)


def _normalise(x: Tensor, weight: Tensor, eps: float, rotation: Tensor | None, out: Tensor) -> None:
    """Fills `out` with the RMS norm of queries and keys x [N, L, ..., 2, H, D], rotated.

    weight [2, 1, D] float32. Computed in float32; other dtypes are converted in parts that fit in the cache.
    """
    angles = None if rotation is None else torch.view_as_complex(plain.along_tokens(rotation, x))
    for n, tokens in _parts(x, x.numel() if x.dtype == torch.float32 else IN_CACHE):
        target = out[n, tokens]
        part = x[n, tokens].float()
        size = torch.linalg.vector_norm(part, dim=-1, keepdim=True)
        scale = size.square_().div_(part.shape[-1]).add_(eps).rsqrt_()
        normed = torch.mul(part, scale, out=target if x.dtype == part.dtype else part).mul_(weight)
        if angles is not None:
            torch.view_as_complex(normed.unflatten(-1, (-1, 2))).mul_(angles[tokens])
        if normed is not target:
            target.copy_(normed)


def _parts(x: Tensor, most: int) -> Iterator[tuple[slice, slice]]:
    """Slices of sequences and tokens of x [N, L, ...] with at most `most` values, but at least one token."""
    single = x[0, 0].numel()
    tokens = min(x.shape[1], max(1, most // single))
    sequences = max(1, most // (tokens * single))
    for n in range(0, len(x), sequences):
        for first in range(0, x.shape[1], tokens):
            yield slice(n, n + sequences), slice(first, first + tokens)


class FoldedText(NamedTuple):
    """Keys and values of M text tokens, multiplied by the query and output projections: two matrices a sample."""

    to_scores: Tensor  # [B, C, H * M]: query projection times keys
    shift: Tensor  # [B, 1, H * M]: query bias times keys
    to_tokens: Tensor  # [B, H * M, C]: values times output projection


class CpuCrossAttention(plain.CrossAttention):
    """Cross-attention to text; projections are folded into the keys and values of a short text."""

    kernels = Kernels(attention, rotate)

    def prepare(self, y: Tensor, keep: Tensor | None) -> Any:
        keys, values = pair = self.read(y)  # [B, M, H, D] each
        batch, length, heads, dim = keys.shape
        width = heads * dim
        small = 2 * length <= dim and 2 * batch * width * length * heads <= MAX_FOLDED
        if keep is not None or not small or not self._foldable(y):
            return pair
        keys = keys * dim**-0.5
        by_head = self.q_linear.weight.unflatten(0, (heads, dim))  # [H, D, C]
        return FoldedText(
            torch.einsum("hdc,bmhd->bchm", by_head, keys).flatten(2),
            torch.einsum("hd,bmhd->bhm", self.q_linear.bias.unflatten(0, (heads, dim)), keys).flatten(1)[:, None],
            torch.einsum("bmhd,chd->bhmc", values, self.proj.weight.unflatten(1, (heads, dim))).flatten(1, 2),
        )

    def _foldable(self, y: Tensor) -> bool:
        layers = self.q_linear, self.proj
        exact = all(isinstance(layer, nn.Linear) and suits(y, layer.weight) for layer in layers)
        return exact and not needs_gradients(y, *self.parameters())

    def forward(self, x: Tensor, y: Any, keep: Tensor | None = None) -> Tensor:
        if not isinstance(y, FoldedText):
            return super().forward(x, y, keep)
        shift, to_scores, to_tokens = (one.expand(len(x), -1, -1) for one in (y.shift, y.to_scores, y.to_tokens))
        scores = torch.baddbmm(shift, x, to_scores).unflatten(-1, (self.num_heads, -1))  # [B, N, H, M]
        return torch.baddbmm(self.proj.bias, scores.softmax(dim=-1).flatten(2), to_tokens)


class CpuCompressedAttention(CompressedAttention):
    """Self-attention to compressed keys and values, by the functions of this module."""

    kernels = Kernels(attention, rotate)


CPU_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    plain.SelfAttention: CpuSelfAttention,
    plain.CrossAttention: CpuCrossAttention,
    CompressedAttention: CpuCompressedAttention,
}
