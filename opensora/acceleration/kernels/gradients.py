"""Attention with gradients of its own, for training on a CPU: the same sums in fewer passes over queries and keys.

PyTorch differentiates operation by operation, and each of them reads and writes everything. Here queries and keys are
normalised, turned and brought into the order of the products part by part in the cache, and so are their gradients on
the way back; scores are scaled by the product that makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IN_CACHE = 2**19  # values of a part


class Heads(torch.autograd.Function):
    """qkv [3, N, S, H, L, D] as queries and keys, normalised (Zhang & Sennrich 2019) and turned (Su et al. 2021), and
    values: [N, S, H, L, D] each, contiguous.

    q_weight, k_weight [D] float32; rotation [L, D / 2] complex, or None. Sums are float32 whatever the type of qkv.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotation: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        weight = torch.stack((q_weight, k_weight))
        made, scale = torch.empty(qkv.shape, dtype=qkv.dtype), torch.empty(2, *qkv.shape[1:-1], 1)
        for part in _parts(qkv):
            both = qkv[:2][part]
            size = torch.linalg.vector_norm(both, dim=-1, keepdim=True, dtype=torch.float32)
            torch.rsqrt(size.square_().div_(both.shape[-1]).add_(eps), out=scale[part])
            normed = _scaled(both, scale[part]).mul_(weight.view(2, 1, 1, 1, 1, -1))
            if rotation is not None:
                _pairs(normed).mul_(rotation)
            made[:2][part] = normed
            made[2:][part] = qkv[2:][part]
        ctx.save_for_backward(qkv, scale, weight, rotation)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, scale, weight, rotation = ctx.saved_tensors
        of_qkv, of_weight = torch.empty_like(qkv), torch.zeros_like(weight)
        for _, n, s in _parts(qkv):
            for one in range(2):
                grad, factor = grads[one][n, s].float().contiguous(), scale[one, n, s]
                if rotation is not None:
                    grad = torch.view_as_real(_pairs(grad) * rotation.conj()).flatten(-2)
                normed = _scaled(qkv[one, n, s], factor)
                rows = (grad * normed).flatten(0, -2)
                of_weight[one] += rows.sum(dim=0)
                mean = torch.mv(rows, weight[one]).div_(-rows.shape[-1])
                grad = torch.addcmul(grad * weight[one], normed, mean.view(factor.shape))
                torch.mul(grad, factor, out=of_qkv[one, n, s])
            of_qkv[2, n, s] = grads[2][n, s]
        return of_qkv, *of_weight, None, None


def _parts(qkv: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Where parts of qkv [3, N, S, H, L, D] begin and end that stay in the cache."""
    sequences, single = qkv.shape[1:3], qkv[0, 0, 0].numel()
    s = min(sequences[1], max(1, IN_CACHE // single))
    n = max(1, IN_CACHE // (s * single)) if s == sequences[1] else 1
    for first in range(0, sequences[0], n):
        for start in range(0, sequences[1], s):
            yield slice(None), slice(first, first + n), slice(start, start + s)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x [..., D] times scale [..., 1], float32 and contiguous."""
    return torch.mul(x, scale, out=scale.new_empty(x.shape))


def _pairs(x: Tensor) -> Tensor:
    """x [..., D] as complex numbers [..., D / 2]."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class Attention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017): q [N, L, D], k and v [N, M, D] of one type -> [N, L, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = _product(q, k.transpose(1, 2), q.shape[-1] ** -0.5).softmax(dim=-1)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, weights = ctx.saved_tensors
        of_scores = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), weights, -1, weights.dtype)
        factor = q.shape[-1] ** -0.5
        return (
            _product(of_scores, k, factor),
            _product(of_scores.transpose(1, 2), q, factor),
            torch.bmm(weights.transpose(1, 2), grad),
        )


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """a [N, L, D] by b [N, D, M], times a number: [N, L, M]."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=factor)
