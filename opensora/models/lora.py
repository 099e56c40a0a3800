"""LoRA adapters of a model: added, weighted, fused and removed. Nothing but its linear layers changes.

An adapter has a pair A [rank, in], B [out, rank] for each of some linear layers; `models/layers/linear.py` computes it.
`LoRAWeights` is its form outside of a model, whatever file it came from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opensora.models.layers.linear import PREFIX, AdaptableLinear, Linear, LoRA

# The linear layers of attention and MLP, in the blocks of every model.
DEFAULT_TARGETS = (
    "attn.qkv", "attn.proj", "attn_temp.qkv", "attn_temp.proj", "cross_attn.q_linear", "cross_attn.kv_linear",
    "cross_attn.proj", "mlp.fc1", "mlp.fc2",
)  # fmt: skip
DEFAULT_RANK = 16
MAX_STRENGTH = 100.0
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class LoRAConfig:
    """A new adapter: its rank, its alpha (None: the rank), and the layers that it adapts.

    A pattern matches the whole name of a module or its end after a dot, with wildcards: "attn.qkv", "*_blocks.0.*".
    `rank_pattern` and `alpha_pattern` override rank and alpha where a pattern matches; the first one counts.
    """

    rank: int = DEFAULT_RANK
    alpha: float | None = None
    targets: Sequence[str] = DEFAULT_TARGETS
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank for a module."""
        return next((rank for pattern, rank in self.rank_pattern.items() if matches(module, pattern)), self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha for a module: by default its rank, which scales B A by 1."""
        default = self.rank_of(module) if self.alpha is None else self.alpha
        return next((alpha for pattern, alpha in self.alpha_pattern.items() if matches(module, pattern)), default)


class LoRALayer(NamedTuple):
    """The adapter of one layer: A [rank, in], B [out, rank], and alpha; it adds (alpha / rank) * B A to the weight."""

    A: Tensor
    B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return len(self.A)


@dataclass(frozen=True)
class LoRAWeights:
    """An adapter outside of a model: module name -> layer.

    base: SHA-256 of the weights that it was trained on, as `Summary.sha256` has it; None if unknown
    metadata: further facts of its file
    """

    layers: Mapping[str, LoRALayer]
    base: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """The number of values."""
        return sum(layer.A.numel() + layer.B.numel() for layer in self.layers.values())


def matches(module: str, pattern: str) -> bool:
    """Whether a pattern matches the name of a module or its end after a dot."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")


def linear_layers(model: nn.Module) -> dict[str, AdaptableLinear]:
    """The layers of a model that take adapters, by the names of their modules."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AdaptableLinear)}


def target_layers(model: nn.Module, config: LoRAConfig) -> dict[str, AdaptableLinear]:
    """The layers that a new adapter adapts. Raises ValueError for a pattern that matches none, and a wrong rank."""
    layers = linear_layers(model)
    patterns = [*config.targets, *config.rank_pattern, *config.alpha_pattern]
    optional = DEFAULT_TARGETS if tuple(config.targets) == DEFAULT_TARGETS else ()
    for pattern in patterns:
        if pattern not in optional and not any(matches(name, pattern) for name in layers):
            known = ", ".join(sorted({re.sub(r"\d+", "N", name) for name in layers}))
            raise ValueError(f"lora: '{pattern}' matches no linear layer of {type(model).__name__}; it has {known}")
    found = {name: one for name, one in layers.items() if any(matches(name, pattern) for pattern in config.targets)}
    for name, layer in found.items():
        most = min(layer.in_features, layer.out_features)
        if not 1 <= config.rank_of(name) <= most:
            raise ValueError(f"lora: the rank of {name} is {config.rank_of(name)}; it must be 1 to {most}")
    return found


def check_weights(model: nn.Module, weights: LoRAWeights) -> None:
    """Raises ValueError, naming the first problem, unless an adapter fits the layers of a model."""
    if not weights.layers:
        raise ValueError("the adapter has no layers")
    layers, kind = linear_layers(model), type(model).__name__
    for name, (a, b, alpha) in weights.layers.items():
        if name not in layers:
            raise ValueError(f"the adapter has {name}, which is no linear layer of {kind}")
        wanted = layers[name].in_features, layers[name].out_features
        if a.ndim != 2 or b.ndim != 2 or (a.shape[1], b.shape[0]) != wanted or len(a) != b.shape[1] or not len(a):
            shapes = f"A {list(a.shape)} and B {list(b.shape)}"
            raise ValueError(
                f"{name}: the adapter has {shapes}; this layer takes A [r, {wanted[0]}], B [{wanted[1]}, r]"
            )
        if not math.isfinite(alpha):
            raise ValueError(f"{name}: alpha is {alpha}; it must be finite")


def adapters_of(model: nn.Module) -> list[str]:
    """The names of the adapters of a model, active or not."""
    return list(dict.fromkeys(name for layer in linear_layers(model).values() for name in layer.adapters()))


def add_adapter(
    model: nn.Module, name: str, adapter: LoRAWeights | LoRAConfig, dtype: torch.dtype | None = None
) -> None:
    """Adds an adapter, active at strength 1 beside those that are: loaded weights, or new ones with B = 0.

    Its tensors are on the devices of their layers, in `dtype` (default: that of the weights; new: float32). Raises
    ValueError for a name that is taken or no name, and where the adapter does not fit.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"an adapter's name has 1 to 64 letters, digits, '_' or '-', not {name[:80]!r}")
    if name in adapters_of(model):
        raise ValueError(f"there is an adapter {name!r} already; choose another name or remove it")
    layers = linear_layers(model)
    if isinstance(adapter, LoRAConfig):
        for target, layer in target_layers(model, adapter).items():
            _attach(layer, name, adapter.rank_of(target), adapter.alpha_of(target), dtype)
        return
    check_weights(model, adapter)
    for target, weights in adapter.layers.items():
        added = _attach(layers[target], name, weights.rank, weights.alpha, dtype or weights.A.dtype)
        with torch.no_grad():
            added.A.copy_(weights.A)
            added.B.copy_(weights.B)
        added.requires_grad_(False)


def _attach(layer: AdaptableLinear, name: str, rank: int, alpha: float, dtype: torch.dtype | None) -> LoRA:
    device = next(chain(layer.parameters(), layer.buffers())).device
    lora = LoRA(layer.in_features, layer.out_features, rank, alpha, device, dtype or torch.float32)
    layer.add_module(PREFIX + name, lora.train(layer.training))
    layer.active = (*layer.active, name)
    return lora


def set_adapters(model: nn.Module, strengths: Mapping[str, float]) -> None:
    """Makes exactly these adapters active, in this order, each with its strength; 0 leaves it out of the computation.

    Raises ValueError for an unknown name, a strength that is not finite or above 100, and a fused model.
    """
    known = adapters_of(model)
    for name, strength in strengths.items():
        if name not in known:
            raise ValueError(f"there is no adapter {name[:80]!r}; there is {', '.join(known) or 'none'}")
        if not abs(strength) <= MAX_STRENGTH:
            raise ValueError(f"the strength of adapter '{name}' is {strength}; it must be within +-{MAX_STRENGTH:g}")
    _refuse_fused(model)
    for layer in linear_layers(model).values():
        own = layer.adapters()
        for name, lora in own.items():
            lora.set_strength(strengths.get(name, lora.strength))
        layer.active = tuple(name for name, strength in strengths.items() if name in own and strength)


def adapter_weights(model: nn.Module, name: str) -> LoRAWeights:
    """A copy of an adapter of a model, at strength 1. Raises ValueError for an unknown name."""
    found = {target: layer.adapters().get(name) for target, layer in linear_layers(model).items()}
    layers = {
        target: LoRALayer(one.A.detach().clone(), one.B.detach().clone(), one.alpha)
        for target, one in found.items() if one is not None
    }  # fmt: skip
    if not layers:
        raise ValueError(f"there is no adapter {name[:80]!r}")
    return LoRAWeights(layers)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Removes an adapter; without any the model is what it was.

    Raises ValueError for an unknown name and for a fused model.
    """
    if name not in adapters_of(model):
        raise ValueError(f"there is no adapter {name[:80]!r}")
    _refuse_fused(model)
    for layer in linear_layers(model).values():
        if name in layer.adapters():
            delattr(layer, PREFIX + name)
            layer.active = tuple(one for one in layer.active if one != name)


def fuse(model: nn.Module) -> None:
    """Adds the active adapters to the weights, which saves their computation. The layers keep their own weights too.

    Raises ValueError for layers without weights to add to, such as quantized ones.
    """
    layers = {name: layer for name, layer in linear_layers(model).items() if layer.active}
    for name, layer in layers.items():
        if not isinstance(layer, Linear):
            raise ValueError(f"{name} is quantized, so no adapter can be fused into it; use the adapter as it is")
    for layer in layers.values():
        assert isinstance(layer, Linear)
        layer.fuse()


def unfuse(model: nn.Module) -> None:
    """Undoes `fuse`, bit for bit."""
    for layer in linear_layers(model).values():
        if isinstance(layer, Linear):
            layer.unfuse()


def is_fused(model: nn.Module) -> bool:
    """Whether adapters are fused into the weights."""
    return any(isinstance(layer, Linear) and layer.unfused is not None for layer in linear_layers(model).values())


def _refuse_fused(model: nn.Module) -> None:
    if is_fused(model):
        raise ValueError("the adapters are fused into the weights; unfuse them first")
