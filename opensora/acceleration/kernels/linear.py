"""Linear layers, MLPs and 1 x 1 convolutions by oneDNN, for inference on a CPU.

PyTorch calls MKL, which leaves half of the vector units idle on processors that are not Intel's; there oneDNN is
faster. In bfloat16 PyTorch calls oneDNN too, but adds the bias in a pass of its own. oneDNN also fuses a GELU into the
matrix product. With gradients enabled the modules compute as the plain ones.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.acceleration.replace_modules import recast
from opensora.models.layers.embeddings import Mlp

MIN_ROWS = 4  # up to this many rows PyTorch's own product is as fast
MIN_CHANNELS = 128  # from here on PyTorch's 1 x 1 convolutions are slower than matrix products
PLAIN_TENSORS = (Tensor, nn.Parameter)  # sharded tensors dispatch their own products
DTYPES = (torch.float32, torch.bfloat16)


def onednn_module(module: nn.Module) -> nn.Module:
    """The oneDNN version of a linear layer, an MLP or a wide 1 x 1 convolution; other modules are returned."""
    if not has_onednn():
        return module
    if type(module) is nn.Linear:
        return recast(module, OneDnnLinear)
    if type(module) is nn.Conv2d and _is_wide_pointwise(module):
        return recast(module, OneDnnPointwise)
    if type(module) is Mlp:
        return recast(module, OneDnnMlp)
    return module


def has_onednn() -> bool:
    """Whether this build of PyTorch has oneDNN's fused linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this processor."""
    return has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def mkl_is_faster() -> bool:
    """Whether PyTorch uses MKL, and the processor is Intel's."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    return torch.backends.mkl.is_available() and "GenuineIntel" in processor


def suits(x: Tensor, weight: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether both are plain CPU tensors of one of the dtypes, outside of autocast and compilation."""
    return (
        x.dtype == weight.dtype
        and x.dtype in dtypes
        and x.device.type == "cpu"
        and type(x) in PLAIN_TENSORS
        and type(weight) in PLAIN_TENSORS
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def onednn_multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN has a fast product for both; in bfloat16 that depends on the processor."""
    return suits(x, weight, DTYPES) and (x.dtype == torch.float32 or multiplies_bf16())


def needs_gradients(*tensors: Tensor) -> bool:
    """Whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class OneDnnLinear(nn.Linear):
    """x [..., in] -> [..., out]; `gelu` applies a tanh-approximated GELU to the result."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        many = x.numel() > MIN_ROWS * self.in_features
        if many and not torch.is_grad_enabled() and onednn_multiplies(x, self.weight):
            return product(x, self.weight, self.bias, gelu)
        out = super().forward(x)
        return F.gelu(out, approximate="tanh") if gelu else out


class OneDnnMlp(Mlp):
    """An MLP whose first layer fuses the GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, gelu=True)) if isinstance(self.fc1, OneDnnLinear) else super().forward(x)


class OneDnnPointwise(nn.Conv2d):
    """x [N, C, H, W] -> [N, O, H, W] by a 1 x 1 kernel, as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        if not suits(x, self.weight) or needs_gradients(x, self.weight):
            return super().forward(x)
        return product(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def _is_wide_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1) and min(
        conv.in_channels, conv.out_channels
    ) >= MIN_CHANNELS


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]; then GELU (tanh), if asked for."""
    if mkl_is_faster() and not gelu and x.dtype == torch.float32:
        return F.linear(x, weight, bias)
    activation = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *activation)


def add_product(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Adds x [rows, in] times weight [out, in] transposed to out [rows, out]."""
    if mkl_is_faster():
        out.addmm_(x, weight.t())
    else:
        out.add_(product(x, weight))
