"""Results of operations on the meta device, which has shapes and dtypes but no values.

PyTorch runs many operations on this device through its Python references: milliseconds each, and the first one imports
torch._dynamo, which takes seconds. The rules below make the same tensors in microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten


def run_on_meta(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of an operation (an `OpOverload`) on meta tensors, by a rule if there is one."""
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    if func._schema.is_mutable or not any(one.is_meta for one in tensors):
        return func(*args, **kwargs)
    if rule := RULES.get(func._overloadpacket):
        return rule(*args, **kwargs)
    if torch.Tag.pointwise in func.tags and "memory_format" not in kwargs:
        return _pointwise(func, args, kwargs, tensors)
    return func(*args, **kwargs)


def _pointwise(func: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor]) -> Tensor:
    """The dtype is that of the operation on single values, the layout that of the first operand of the full shape."""
    args, kwargs = tree_map_only(Tensor, lambda one: torch.ones((1,) * one.ndim, dtype=one.dtype), (args, kwargs))
    dtype, shape = func(*args, **kwargs).dtype, torch.broadcast_tensors(*tensors)[0].shape
    like = next((one for one in tensors if one.shape == shape), None)
    return torch.empty(shape, dtype=dtype, device="meta") if like is None else torch.empty_like(like, dtype=dtype)


def _addmm(bias: Tensor, one: Tensor, other: Tensor, **_: Any) -> Tensor:
    return one.new_empty(one.shape[0], other.shape[1])


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(one.shape[dim] for one in tensors)
    return tensors[0].new_empty(shape)


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape.insert(dim if dim >= 0 else dim + len(shape) + 1, len(tensors))
    return tensors[0].new_empty(shape)


def _layer_norm(x: Tensor, shape: Sequence[int], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and standard deviation of each row."""
    rows = (*x.shape[: -len(shape)], *(1 for _ in shape))
    return torch.empty_like(x), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _group_norm(
    x: Tensor, weight: Any, bias: Any, batch: int, channels: int, pixels: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and standard deviation of each group."""
    return torch.empty_like(x), x.new_empty(batch, groups), x.new_empty(batch, groups)


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return aten.sum.dim_IntList(x, dim, keepdim, dtype=dtype)


RULES: dict[Any, Callable[..., Any]] = {
    aten.addmm: _addmm,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.native_layer_norm: _layer_norm,
    aten.native_group_norm: _group_norm,
    aten.mean: _mean,
}
