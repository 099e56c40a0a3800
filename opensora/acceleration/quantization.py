"""Linear layers in 8 bits, int8 or fp8: an approximation that has to be requested.

Weights [out, in] are quantized once, with a scale for each output; activations at every call, with a scale for each
token: x w = (x / s_x) (w / s_w) s_x s_w. The quotients are rounded to -127..127 (LLM.int8, Dettmers et al. 2022,
without its outliers) or to e4m3 (Micikevicius et al. 2022, arXiv:2209.05433). Products accumulate in 32 bits; those of
e4m3 are returned in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.errors import ConfigError
from opensora.models.layers.linear import AdaptableLinear

MIN_ROWS = 32  # of an int8 product; some kernels need at least 17
MIN_FEATURES = 128  # of a quantized layer, inputs and outputs
MULTIPLE = 16  # of its inputs and outputs, which the kernels require
EXACT = ("embedder", "t_block", "final_layer", "adaLN")  # parts of names of layers that stay exact


class EightBitLinear(AdaptableLinear):
    """x [..., in] -> [..., out] with the weights of `linear` in 8 bits, which stay as they are.

    Where gradients are recorded, activations keep their type and gradients flow to x, so that adapters can be trained.
    """

    largest: float  # magnitude of the 8-bit type
    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = self.quantize(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    @classmethod
    def quantize(cls, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [N, in] in 8 bits, and their scales [N, 1] float32."""
        rows = rows.float()
        scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / cls.largest
        return cls.round(rows / scale), scale

    @classmethod
    def round(cls, x: Tensor) -> Tensor:
        """Values within +-`largest` in the 8-bit type."""
        raise NotImplementedError

    def multiply(self, small: Tensor, scale: Tensor) -> Tensor:
        """The layer's output [N, out] for quantized rows and their scales."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.adapted(x, FrozenProduct.apply(x, self.weight, self.scale, self.bias))
        out = self.multiply(*self.quantize(x.flatten(0, -2)))
        return self.adapted(x, out.to(x.dtype).unflatten(0, x.shape[:-1]))


class FrozenProduct(torch.autograd.Function):
    """x W^T + b of 8-bit weights, unpacked for each product and not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, unpack(weight, scale, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return grad @ unpack(weight, scale, grad.dtype), None, None, None


def unpack(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [out, in] of their 8-bit form and its scales [out]."""
    return (weight.float() * scale[:, None]).to(dtype)


class Int8Linear(EightBitLinear):
    """A linear layer in int8."""

    largest = 127.0

    @classmethod
    def round(cls, x: Tensor) -> Tensor:
        return x.round_().to(torch.int8)

    def multiply(self, small: Tensor, scale: Tensor) -> Tensor:
        padded = F.pad(small, (0, 0, 0, max(0, MIN_ROWS - len(small))))
        out = torch._int_mm(padded, self.weight.t())[: len(small)] * self.scale
        return out.mul_(scale) if self.bias is None else torch.addcmul(self.bias.float(), out, scale)


class Fp8Linear(EightBitLinear):
    """A linear layer in fp8 (e4m3)."""

    largest = 448.0

    @classmethod
    def round(cls, x: Tensor) -> Tensor:
        return x.to(torch.float8_e4m3fn)

    def multiply(self, small: Tensor, scale: Tensor) -> Tensor:
        out = torch._scaled_mm(small, self.weight.t(), scale, self.scale[None], out_dtype=torch.bfloat16)
        return out if self.bias is None else out + self.bias


KINDS: dict[str, type[EightBitLinear]] = {"int8": Int8Linear, "fp8": Fp8Linear}


def quantize(model: nn.Module, kind: str = "int8", exact: tuple[str, ...] = EXACT) -> nn.Module:
    """Quantizes the linear layers of a model's blocks in place; those whose name contains a part of `exact` stay."""
    for name, layer in list(_layers(model, exact)):
        model.set_submodule(name, KINDS[kind](layer))
    return model


def num_quantized(model: nn.Module) -> int:
    """The number of weights that `quantize` converts."""
    return sum(layer.weight.numel() for _, layer in _layers(model, EXACT))


def _layers(model: nn.Module, exact: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    """Names and layers to quantize."""
    for name, layer in model.named_modules():
        exempt = any(part in name for part in exact)
        if isinstance(layer, nn.Linear) and not exempt and is_quantizable(layer.weight.shape):
            yield name, layer


def is_quantizable(shape: Sequence[int]) -> bool:
    """Whether 8-bit products take a weight [out, in] of this shape, and it is large enough to gain from them."""
    return min(shape) >= MIN_FEATURES and not any(size % MULTIPLE for size in shape)


@torch.no_grad()
def check(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError if a device cannot multiply in `kind`; "exact" always passes."""
    if kind == "exact":
        return
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(MIN_FEATURES, MIN_FEATURES)
    try:
        KINDS[kind](layer).to(device)(torch.ones(1, MIN_FEATURES, device=device, dtype=dtype))
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:150]
        others = " or ".join(f"--linear {name}" for name in ("exact", *KINDS) if name != kind)
        raise ConfigError(f"this device ({device}) cannot multiply in {kind} ({reason}); use {others}") from error
