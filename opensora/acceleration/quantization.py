"""Linear layers in 8 bits, integers or floating point: an approximation to be asked for.

Weights [out, in] have a scale for each output (in advance), inputs one for each token (at every call), so that large
tokens do not coarsen small ones: x w = (x / s_x) (w / s_w) s_x s_w. The quotients are rounded to -127..127 (LLM.int8,
Dettmers et al. 2022, without its outliers) or to e4m3 (Micikevicius et al. 2022, arXiv:2209.05433): finer for small
values, coarser for large ones. Sums have 32 bits; those of e4m3 are given in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.errors import ConfigError

FEWEST = 32  # rows of a product of integers: some kernels take no fewer than 17
LEAST = 128  # inputs and outputs below which a layer stays as it is; modulation and embeddings are told by their names
MULTIPLE = 16  # of inputs and outputs, for the kernels
KEPT = ("embedder", "t_block", "final_layer", "adaLN")


class EightBitLinear(nn.Module):
    """x [..., in] -> [..., out] by the weights of `linear`, rounded to 8 bits; for inference."""

    largest: float  # magnitude in 8 bits

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = self.shrink(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def shrink(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [N, in] in 8 bits, and what each has been divided by [N, 1] float32."""
        rows = rows.float()
        scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / self.largest
        return self.round(rows / scale), scale

    def forward(self, x: Tensor) -> Tensor:
        out = self.multiply(*self.shrink(x.flatten(0, -2)))
        return out.to(x.dtype).unflatten(0, x.shape[:-1])


class Int8Linear(EightBitLinear):
    """By products of integers."""

    largest = 127.0

    def round(self, x: Tensor) -> Tensor:
        return x.round_().to(torch.int8)

    def multiply(self, small: Tensor, scale: Tensor) -> Tensor:
        padded = F.pad(small, (0, 0, 0, max(0, FEWEST - len(small))))
        out = torch._int_mm(padded, self.weight.t())[: len(small)] * self.scale
        return out.mul_(scale) if self.bias is None else torch.addcmul(self.bias.float(), out, scale)


class Fp8Linear(EightBitLinear):
    """By products of 8-bit floating point, e4m3."""

    largest = 448.0

    def round(self, x: Tensor) -> Tensor:
        return x.to(torch.float8_e4m3fn)

    def multiply(self, small: Tensor, scale: Tensor) -> Tensor:
        scales = {"scale_a": scale, "scale_b": self.scale[None]}
        out = torch._scaled_mm(small, self.weight.t(), out_dtype=torch.bfloat16, **scales)
        return out if self.bias is None else out + self.bias


KINDS: dict[str, type[EightBitLinear]] = {"int8": Int8Linear, "fp8": Fp8Linear}


def quantize(model: nn.Module, kind: str = "int8", kept: tuple[str, ...] = KEPT) -> nn.Module:
    """The model with the linear layers of its blocks in 8 bits; those whose name has a part in `kept` stay."""
    for name, layer in list(_layers(model, kept)):
        model.set_submodule(name, KINDS[kind](layer))
    return model


def num_values(model: nn.Module) -> int:
    """How many weights of a model `quantize` would round."""
    return sum(layer.weight.numel() for _, layer in _layers(model, KEPT))


def _layers(model: nn.Module, kept: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    """Names and layers that become 8 bits."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not any(part in name for part in kept):
            shape = layer.weight.shape
            if min(shape) >= LEAST and not any(size % MULTIPLE for size in shape):
                yield name, layer


def check(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError where a device has no such products; all have "exact" ones."""
    if kind == "exact":
        return
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(LEAST, LEAST)
    try:
        KINDS[kind](layer).to(device)(torch.ones(1, LEAST, device=device, dtype=dtype))
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:150]
        others = " or ".join(f"--linear {name}" for name in ("exact", *KINDS) if name != kind)
        raise ConfigError(f"this device ({device}) cannot multiply in {kind} ({reason}); use {others}") from error
