"""Linear layers on a CPU by the library that is fastest there: the same sums.

PyTorch's own choice, MKL, leaves half of the vector units idle on some processors of other makers than its own.
oneDNN's kernels suit them all, and take its place there. On those of its maker MKL is faster, most of all for
gradients. In bfloat16 all products are oneDNN's; called by PyTorch it is told a bias in a pass of its own.

Convolutions whose kernel is a single pixel are linear layers of every pixel. What follows the first layer of an MLP is
computed with its product, while it is in the cache; this oneDNN alone can do.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from opensora.models.layers.embeddings import Mlp

FEW = 4  # rows that are no work for a matrix product
WIDE = 128  # channels from which on PyTorch's convolutions of single pixels are slower than matrix products
PLAIN = (Tensor, nn.Parameter)  # sharded parameters know their own product
INFERRED = (torch.float32, torch.bfloat16)
TRAINED = (torch.float32, torch.bfloat16, torch.float16)


def use_onednn(model: nn.Module) -> None:
    """Makes the linear layers of a model compute by oneDNN where they can; parameters and their names stay."""
    if has_onednn():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
            elif type(module) is nn.Conv2d and _of_single_pixels(module):
                module.__class__ = OneDnnPointwise
            elif type(module) is Mlp:
                module.__class__ = OneDnnMlp


def has_onednn() -> bool:
    """Whether this PyTorch has the products that are used here."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.aten, "mkldnn_linear_backward_weights")
    )


@cache
def multiplies_bf16() -> bool:
    """Whether there are products of bfloat16 for this processor."""
    return has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def mkl_is_faster() -> bool:
    """Whether PyTorch's own products are MKL's, on a processor of its maker."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    return torch.backends.mkl.is_available() and "GenuineIntel" in processor


def suits(x: Tensor, weight: Tensor, types: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether these are plain tensors of one of the types on a CPU, to be multiplied at once and in that type."""
    return (
        x.dtype == weight.dtype
        and x.dtype in types
        and x.device.type == "cpu"
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can be asked for the product of these, which takes a processor for it in bfloat16."""
    return suits(x, weight, INFERRED) and (x.dtype == torch.float32 or multiplies_bf16())


def needs_gradients(*tensors: Tensor) -> bool:
    """Whether what is computed of these tensors is to be differentiated."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def in_training(*tensors: Tensor) -> bool:
    """Whether these are plain tensors on a CPU, of float32 or what autocast makes of it, to be differentiated."""
    plain = all(type(x) in PLAIN and x.device.type == "cpu" and x.dtype in TRAINED for x in tensors)
    return plain and needs_gradients(*tensors) and not torch.compiler.is_compiling()


def product_type(x: Tensor) -> torch.dtype:
    """The type that products take of x: autocast's, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class OneDnnLinear(nn.Linear):
    """x [..., in] -> [..., out]; what oneDNN is not asked to do is done as in any linear layer."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        learns, many = torch.is_grad_enabled(), x.numel() > FEW * self.in_features
        if many and not learns and multiplies(x, self.weight):
            return product(x, self.weight, self.bias, gelu)
        apart = many and learns and not mkl_is_faster() and suits(x, self.weight)
        out = _Linear.apply(x, self.weight, self.bias) if apart else super().forward(x)
        return F.gelu(out, approximate="tanh") if gelu else out


class OneDnnMlp(Mlp):
    """The same, its GELU computed by its first layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, gelu=True)) if isinstance(self.fc1, OneDnnLinear) else super().forward(x)


class OneDnnPointwise(nn.Conv2d):
    """x [N, C, H, W] -> [N, O, H, W] by a kernel of one pixel, where no gradients are asked for."""

    def forward(self, x: Tensor) -> Tensor:
        if not suits(x, self.weight) or needs_gradients(x, self.weight):
            return super().forward(x)
        return product(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def _of_single_pixels(conv: nn.Conv2d) -> bool:
    return (
        (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)
        and min(conv.in_channels, conv.out_channels) >= WIDE
        and not conv.weight.requires_grad
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
            weight_gradient(rows, x.flatten(0, -2), weight) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x [..., in] by the transpose of weight [out, in], plus bias [out]; of that the GELU by tanh, if asked for."""
    if mkl_is_faster() and not gelu and x.dtype == torch.float32:
        return F.linear(x, weight, bias)
    then = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *then)


def add_product(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Adds x [rows, in] by the transpose of weight [out, in] to out [rows, out]."""
    if mkl_is_faster():
        out.addmm_(x, weight.t())
    else:
        out.add_(product(x, weight))


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The transpose of grad [rows, out] by x [rows, in]: [out, in], as weight is.

    Moving what has more columns for a product takes longer than what moves neither, so outputs are moved only if few.
    """
    if len(weight) < weight.shape[1]:
        return product(grad.t(), x.t())
    of_weight, _ = torch.ops.aten.mkldnn_linear_backward_weights(grad.to_mkldnn(), x.to_mkldnn(), weight, False)
    return of_weight
