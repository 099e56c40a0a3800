"""Linear layers that take adapters: LoRA (Hu et al. 2021, arXiv:2106.09685).

y = W x + b + sum over the active adapters of strength * (alpha / rank) * B A x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PREFIX = "lora_"  # of the name of an adapter among the children of its layer


class LoRA(nn.Module):
    """One adapter of a layer: x [..., in] -> factor * B A x [..., out], factor = strength * alpha / rank.

    A [rank, in] is drawn from U(-1 / sqrt(in), 1 / sqrt(in)), B [out, rank] starts at zero. `factor` is a tensor, so
    that compiled code and CUDA graphs follow a change of the strength.
    """

    factor: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float,
        device: torch.device | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rank, self.alpha, self.strength = rank, alpha, 1.0
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.register_buffer("factor", torch.tensor(alpha / rank, device=device), persistent=False)

    def set_strength(self, strength: float) -> None:
        """Scales the adapter."""
        self.strength = strength
        self.factor.fill_(strength * self.alpha / self.rank)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """The contribution to the outputs from index `first` on."""
        return F.linear(F.linear(x, self.A.to(x.dtype)) * self.factor, self.B[first:].to(x.dtype))

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, [out, in], in the adapter's dtype."""
        return (self.strength * self.alpha / self.rank) * (self.B @ self.A)


class AdaptableLinear(nn.Module):
    """Base of linear layers that take adapters. Its subclasses pass their output through `adapted`."""

    in_features: int
    out_features: int
    active: tuple[str, ...] = ()  # names of the adapters that take part

    def lora(self, name: str) -> LoRA:
        """The adapter of this name. Raises AttributeError if there is none."""
        adapter = self.get_submodule(PREFIX + name)
        assert isinstance(adapter, LoRA)
        return adapter

    def adapters(self) -> dict[str, LoRA]:
        """All adapters by name, active or not."""
        children = ((name, child) for name, child in self.named_children() if isinstance(child, LoRA))
        return {name.removeprefix(PREFIX): child for name, child in children}

    def adapted(self, x: Tensor, out: Tensor, first: int = 0) -> Tensor:
        """`out`, the layer's own outputs from index `first` on for the input x, plus those of the active adapters."""
        for name in self.active:
            out = out + self.lora(name)(x, first).to(out.dtype)
        return out


class Linear(nn.Linear, AdaptableLinear):
    """x [..., in] -> [..., out]; every linear layer of the diffusion models.

    Frozen weights may have another floating type than x, in which the layer computes.
    """

    unfused: Tensor | None = None  # the weight without the adapters that are fused into it
    fused: tuple[str, ...] = ()  # their names

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x, 0)

    def outputs(self, x: Tensor, first: int) -> Tensor:
        """The outputs from index `first` on, [..., out - first]."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if weight.dtype != x.dtype and not weight.requires_grad:
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if first:
            weight, bias = weight[first:], None if bias is None else bias[first:]
        return self.adapted(x, F.linear(x, weight, bias), first)

    @torch.no_grad()
    def fuse(self) -> None:
        """Adds the active adapters to the weight, rounded once to its dtype."""
        if not self.active:
            return
        self.unfused, self.fused, self.active = self.weight.detach(), self.active, ()
        total = self.unfused.float() if self.unfused.itemsize < 4 else self.unfused
        for name in self.fused:
            total = total + self.lora(name).delta()
        self.weight = nn.Parameter(total.to(self.unfused.dtype), self.weight.requires_grad)

    def unfuse(self) -> None:
        """Restores the weight as it was before `fuse`, bit for bit, and the adapters beside it."""
        if self.unfused is not None:
            self.weight = nn.Parameter(self.unfused.to(self.weight.device), self.weight.requires_grad)
            self.unfused, self.active, self.fused = None, self.fused, ()
