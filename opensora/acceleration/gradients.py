"""Attention with gradients of its own, for training on a CPU: the same sums in fewer passes over queries and keys.

PyTorch differentiates operation by operation, and each of them reads and writes everything. Here queries and keys are
normalised, turned and brought into the order of the products together, and so are their gradients on the way back;
scores are scaled by the product that makes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Heads(torch.autograd.Function):
    """qkv [3, N, S, H, L, D] as queries and keys, normalised (Zhang & Sennrich 2019) and turned (Su et al. 2021), and
    values: [N, S, H, L, D] each, contiguous.

    q_weight, k_weight [D] float32; rotation [L, D / 2] complex, or None. Sums are float32 whatever the type of qkv.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotation: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        both, weight = qkv[:2], torch.stack((q_weight, k_weight))
        size = torch.linalg.vector_norm(both, dim=-1, keepdim=True, dtype=torch.float32)
        scale = size.square_().div_(both.shape[-1]).add_(eps).rsqrt_()  # [2, N, S, H, L, 1]
        made = _scaled(both, scale).mul_(weight.view(2, 1, 1, 1, 1, -1))
        if rotation is not None:
            _pairs(made).mul_(rotation)
        ctx.save_for_backward(qkv, scale, weight, rotation)
        return *made.to(qkv.dtype), qkv[2].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, scale, weight, rotation = ctx.saved_tensors
        of_qkv, of_weight = torch.empty_like(qkv), torch.empty_like(weight)
        of_qkv[2] = grads[2]
        for part in range(2):
            grad = grads[part].float().contiguous()
            if rotation is not None:
                grad = torch.view_as_real(_pairs(grad) * rotation.conj()).flatten(-2)
            normed = _scaled(qkv[part], scale[part])
            rows = (grad * normed).flatten(0, -2)
            torch.sum(rows, dim=0, out=of_weight[part])
            mean = torch.mv(rows, weight[part]).div_(-rows.shape[-1])
            grad = torch.addcmul(grad * weight[part], normed, mean.view(scale[part].shape))
            torch.mul(grad, scale[part], out=of_qkv[part])
        return of_qkv, *of_weight, None, None


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
