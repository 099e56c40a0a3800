"""Results of operations on the meta device, which has shapes and dtypes but no values.

PyTorch runs many operations on this device through its Python references: milliseconds each, and the first one imports
torch._dynamo, which takes seconds. The rules below make the same tensors in microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class MetaShapes(TorchDispatchMode):
    """Operations on the meta device follow the rules of this module, for example while a model is built there."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True, the default, imports torch._dynamo

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return run_on_meta(func, args, kwargs, tensors_in(args, kwargs))


def run_on_meta(func: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    """The result of an operation (an `OpOverload`) of `tensors`, on meta tensors by a rule if there is one."""
    if not any(one.is_meta for one in tensors) and str(kwargs.get("device")) != "meta":
        return func(*args, **kwargs)
    if rule := RULES.get(func._overloadpacket):
        return rule(*args, **kwargs)
    if func._schema.name.endswith("_"):  # in place
        return args[0]
    if torch.Tag.pointwise in func.tags and "memory_format" not in kwargs:
        return _pointwise(func, args, kwargs, tensors)
    return func(*args, **kwargs)


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors of arguments or results, in order, those in lists, tuples and dicts included."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


def _pointwise(func: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor]) -> Tensor:
    """The dtype is that of the operation on single values, the layout that of the first operand of the full shape."""
    single = (torch.ones((1,) * one.ndim, dtype=one.dtype) if isinstance(one, Tensor) else one for one in args)
    dtype, shape = func(*single, **kwargs).dtype, torch.broadcast_tensors(*tensors)[0].shape
    like = next((one for one in tensors if one.shape == shape), None)
    return torch.empty(shape, dtype=dtype, device="meta") if like is None else _empty_like(like, dtype)


def _empty_like(x: Tensor, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """A dense tensor of the shape of x whose axes lie in memory as those of x do."""
    dtype = dtype or x.dtype
    if x.is_contiguous():
        return torch.empty(x.shape, dtype=dtype, device="meta")
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    dense = torch.empty([x.shape[axis] for axis in order], dtype=dtype, device="meta")
    return dense.permute([order.index(axis) for axis in range(x.ndim)])


def _addmm(bias: Tensor, one: Tensor, other: Tensor, **_: Any) -> Tensor:
    return one.new_empty(one.shape[0], other.shape[1])


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(one.shape[dim] for one in tensors)
    return tensors[0].new_empty(shape)


def _mm(one: Tensor, other: Tensor) -> Tensor:
    """Of matrices, or batches of them."""
    return one.new_empty(*one.shape[:-1], other.shape[-1])


def _convolution(
    x: Tensor, weight: Tensor, bias: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    transposed: bool, *_: Any,
) -> Tensor:  # fmt: skip
    assert not transposed, "no model has transposed convolutions"
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return x.new_empty(len(x), len(weight), *((side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in sides))


def _upsample(x: Tensor, output_size: Sequence[int], *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], *output_size)


def _pad(x: Tensor, pad: Sequence[int], value: float = 0) -> Tensor:
    """pad: entries before and after each axis, the last axis first."""
    shape = list(x.shape)
    for axis, pair in enumerate(zip(pad[::2], pad[1::2], strict=True), start=1):
        shape[-axis] += sum(pair)
    return x.new_empty(shape)


def _repeat(x: Tensor, repeats: Sequence[int]) -> Tensor:
    sizes = (*(1,) * (len(repeats) - x.ndim), *x.shape)
    return x.new_empty([size * times for size, times in zip(sizes, repeats, strict=True)])


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape.insert(dim if dim >= 0 else dim + len(shape) + 1, len(tensors))
    return tensors[0].new_empty(shape)


def _layer_norm(x: Tensor, shape: Sequence[int], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and standard deviation of each row."""
    rows = (*x.shape[: -len(shape)], *(1 for _ in shape))
    return _empty_like(x), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _group_norm(
    x: Tensor, weight: Any, bias: Any, batch: int, channels: int, pixels: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and standard deviation of each group."""
    return _empty_like(x), x.new_empty(batch, groups), x.new_empty(batch, groups)


def _reduced(
    x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    axes = {axis % x.ndim for axis in (range(x.ndim) if dim is None else dim)}
    sizes = [1 if axis in axes else size for axis, size in enumerate(x.shape) if keepdim or axis not in axes]
    return x.new_empty(sizes, dtype=dtype)


def _arange(*bounds: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """bounds: end; start and end; or start, end and step."""
    start, end = bounds[:2] if len(bounds) > 1 else (0, bounds[0])
    step = bounds[2] if len(bounds) > 2 else 1
    default = torch.int64 if all(isinstance(one, int) for one in bounds) else torch.get_default_dtype()
    return torch.empty(math.ceil((end - start) / step), dtype=dtype or default, device="meta")


def _randn(size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


RULES: dict[Any, Callable[..., Any]] = {
    aten.addmm: _addmm,
    aten.arange: _arange,
    aten.bmm: _mm,
    aten.cat: _cat,
    aten.constant_pad_nd: _pad,
    aten.convolution: _convolution,
    aten.empty_like: _empty_like,
    aten.repeat: _repeat,
    aten.stack: _stack,
    aten.native_layer_norm: _layer_norm,
    aten.native_group_norm: _group_norm,
    aten.mean: _reduced,
    aten.mm: _mm,
    aten.ones_like: _empty_like,
    aten.randn: _randn,
    aten.upsample_nearest2d: _upsample,
    aten.zeros_like: _empty_like,
}
