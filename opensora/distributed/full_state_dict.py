"""Tensors that are sharded over the ranks, made whole for a file, and filled from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from opensora.distributed.fsdp import Layout


def whole(value: Any, layout: Layout) -> Any:
    """A copy of nested dicts and lists of tensors in the memory of the main rank, no tensor sharded; elsewhere None.

    All ranks have to call this together.
    """
    copied = _copied(value, layout.is_main)
    return copied if layout.is_main else None


def _copied(value: Any, keep: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item, keep) for item in value)
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.to("cpu", copy=True) if keep else None


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Overwrites a tensor, which may be sharded, with whole `values` of its shape."""
    tensor.copy_(spread(values, tensor))


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Whole `values`, which every rank has, on the device of `like` and sharded as it is."""
    values = values.to(like.device)
    return distribute_tensor(values, like.device_mesh, like.placements) if isinstance(like, DTensor) else values
