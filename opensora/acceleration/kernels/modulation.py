"""Modulation with gradients of its own, for training on a CPU: the same sums, made part by part in its cache.

PyTorch goes over all tokens once for each operation and each gradient, and keeps what the norm has made; here it is
made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from opensora.acceleration.kernels.linear import in_training, product_type
from opensora.models.layers import blocks as plain

IN_CACHE = 2**18  # values of a part


def use_host_modulation(model: nn.Module) -> None:
    """Makes the blocks of a model modulate by the function below."""
    for module in model.modules():
        if isinstance(module, plain.Block):
            module.modulate = modulated


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift of x [B, T, S, C] by rows [B, T or 1, 1, C]; under autocast in its type."""
    if not in_training(x, shift, scale) or {x.dtype, shift.dtype, scale.dtype} != {torch.float32}:
        return plain.modulated(x, shift, scale)
    rows = (row.reshape(-1, x.shape[-1]) for row in (shift, 1 + scale))
    return _Modulated.apply(x.contiguous(), *rows, product_type(x))


class _Modulated(torch.autograd.Function):
    """x [..., C], shift and weight [rows, C]: each row serves an equal part of the tokens, one after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        out, mean, rstd = torch.empty_like(x, dtype=dtype), *x.new_empty(2, *x.shape[:-1], 1)
        for row, (tokens, *places) in _parts(len(weight), x, out, mean, rstd):
            made = torch.native_layer_norm(tokens, x.shape[-1:], weight[row], shift[row], plain.EPS)
            for place, one in zip(places, made, strict=True):
                place.copy_(one)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        of_x, of_shift, of_weight = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(weight)
        back, all_three = torch.ops.aten.native_layer_norm_backward, [True] * 3
        for row, (given, tokens, place, *norms) in _parts(len(weight), grad.contiguous(), x, of_x, mean, rstd):
            made = back(given.float(), tokens, x.shape[-1:], *norms, weight[row], weight[row], all_three)
            place.copy_(made[0])
            of_weight[row] += made[1]
            of_shift[row] += made[2]
        return of_x, of_shift, of_weight, None


def _parts(rows: int, *tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Parts that fit in the cache of tensors [..., C or 1], all of the same tokens, each with the row it belongs to."""
    together = max(1, IN_CACHE // tensors[0].shape[-1])
    for row, tokens in enumerate(zip(*(x.view(rows, -1, x.shape[-1]) for x in tensors), strict=True)):
        for part in zip(*(x.split(together) for x in tokens), strict=True):
            yield row, part
