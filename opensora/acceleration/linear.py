"""Linear layers of float32 on a CPU through oneDNN: the same sums, by kernels that suit every maker's processor.

PyTorch's own choice for float32, MKL, leaves half of the vector units idle on processors of other makers than its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW = 4  # rows that are no work for a matrix product
PLAIN = (Tensor, nn.Parameter)  # sharded parameters know their own product


def use_onednn(model: nn.Module) -> None:
    """Makes the linear layers of a model compute by oneDNN where they can; parameters and their names stay."""
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear


class OneDnnLinear(nn.Linear):
    """x [..., in] -> [..., out]; what oneDNN is not asked to do is done as in any linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.suits(x):
            return super().forward(x)
        compute = _Linear.apply if torch.is_grad_enabled() else product
        return compute(x, self.weight, self.bias)

    def suits(self, x: Tensor) -> bool:
        """Whether this is a product of plain float32 matrices on a CPU, computed at once and in that type."""
        return (
            x.dtype == self.weight.dtype == torch.float32
            and x.device.type == "cpu"
            and type(x) in PLAIN
            and type(self.weight) in PLAIN
            and x.numel() > FEW * self.in_features
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )


class _Linear(torch.autograd.Function):
    """The layer and its two gradients, which are products too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if of_x else None,
            product(rows.t(), x.flatten(0, -2).t()) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] by the transpose of weight [out, in], plus bias [out]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
