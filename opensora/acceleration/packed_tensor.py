"""Weights that stay packed in memory and are unpacked for each use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from opensora.acceleration.packed_formats import FORMATS

aten = torch.ops.aten
CHUNK = 2**21  # values that are unpacked at once in float32


class PackedTensor(Tensor):
    """A weight [rows, columns] in a `PackedFormat`; operations see `unpack()`, its values in its dtype.

    Layers that hold it need no code of their own: `F.linear(x, weight)` unpacks the weight, multiplies, and frees it.
    Moves between devices, casts, slices of rows and embeddings keep it packed; a cast changes the dtype of its values.
    It cannot be changed in place.
    """

    packed: Tensor  # [rows, ...]
    scale: Tensor | None  # [rows, 1] float32, or None
    format: str  # a key of FORMATS

    @staticmethod
    def __new__(
        cls: type[PackedTensor], packed: Tensor, scale: Tensor | None, format: str, dtype: torch.dtype = torch.float32
    ) -> PackedTensor:
        kind = FORMATS[format]
        shape = (len(packed), packed.shape[1] // kind.block_bytes * kind.block_size)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)

    def __init__(self, packed: Tensor, scale: Tensor | None, format: str, dtype: torch.dtype = torch.float32) -> None:
        self.packed, self.scale, self.format = packed, scale, format

    def unpack(self) -> Tensor:
        """The values as a plain tensor."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        start = 0
        for values in self.chunks():
            out[start : start + len(values)] = values
            start += len(values)
        return out

    def chunks(self) -> Iterator[Tensor]:
        """The values of some rows at a time, in float32."""
        size = max(1, CHUNK // self.shape[1])
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            scale = None if self.scale is None else self.scale[rows]
            yield FORMATS[self.format].unpack(self.packed[rows], scale)

    def parts(self) -> list[Tensor]:
        """The stored tensors."""
        return [self.packed] if self.scale is None else [self.packed, self.scale]

    def _map(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> PackedTensor:
        scale = None if self.scale is None else change(self.scale)
        return PackedTensor(change(self.packed), scale, self.format, dtype or self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedTensor({self.format}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["packed"] if self.scale is None else ["packed", "scale"], (self.format, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> PackedTensor:
        return PackedTensor(inner["packed"], inner.get("scale"), *context)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.linear and torch.is_grad_enabled():
            return _linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch.inference_mode(False):  # a view of a weight must be of its kind, which is no inference tensor
            if (kept := _still_packed(function, args, kwargs)) is not None:
                return kept
            _check_not_written(function, args)
            return function(*tree_map(unpacked, args), **tree_map(unpacked, kwargs))


def _still_packed(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The result of an operation that needs no unpacked weight; None for all others."""
    weight = args[0]
    if not isinstance(weight, PackedTensor):
        return None
    if function in (aten.detach.default, aten.alias.default, aten.clone.default):
        return weight._map(lambda tensor: function(tensor))
    if function.overloadpacket is aten.to:  # inference mode leaves it whole
        return function.decompose(*args, **kwargs)
    if function is aten._to_copy.default:
        dtype = kwargs.get("dtype") or weight.dtype
        if dtype.is_floating_point:
            return weight._map(lambda tensor: tensor.to(kwargs.get("device")), dtype)
    if function is aten.slice.Tensor and (len(args) < 2 or args[1] == 0):
        return weight._map(lambda tensor: function(tensor, *args[1:], **kwargs))
    if function is aten.embedding.default:
        rows = weight._map(lambda tensor: tensor.index_select(0, args[1].flatten()))
        return rows.unpack().unflatten(0, args[1].shape)
    return None


def unpacked(value: Any) -> Any:
    """A packed weight as a plain tensor; anything else as it is."""
    return value.unpack() if isinstance(value, PackedTensor) else value


def _check_not_written(function: Any, args: tuple[Any, ...]) -> None:
    for argument, value in zip(function._schema.arguments, args, strict=False):
        if isinstance(value, PackedTensor) and argument.alias_info and argument.alias_info.is_write:
            raise RuntimeError(f"{function} would change a packed weight in place; assign a new one")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with gradients to all but a packed weight."""
    if isinstance(weight, PackedTensor):
        return _Linear.apply(x, weight, bias)
    with torch._C.DisableTorchFunctionSubclass():
        return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """x W^T + b of a frozen packed W, which is unpacked once more in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        ctx.packed, ctx.dtype = weight, x.dtype
        return F.linear(x, weight.unpack(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = gradients
        to_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return (gradient @ ctx.packed.unpack().to(gradient.dtype)).to(ctx.dtype), None, to_bias


def unpack_weights(model: nn.Module) -> None:
    """Replaces the packed weights of a model by plain ones."""
    for module in model.modules():
        for name, tensor in list(module._parameters.items()):
            if tensor is not None and isinstance(tensor, PackedTensor):
                module.register_parameter(name, nn.Parameter(tensor.unpack(), tensor.requires_grad))
