"""Full tensors of sharded models: gathered for a file, and scattered from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from opensora.acceleration.device import HOST
from opensora.distributed.process_group import RankLayout


def full_state_dict(state: Any, layout: RankLayout) -> Any:
    """A copy of nested dicts and lists with full tensors, in the host memory of the main rank; None on other ranks.

    All ranks have to call it together.
    """
    copied = _gathered(state, layout.is_main)
    return copied if layout.is_main else None


def _gathered(value: Any, keep: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _gathered(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_gathered(item, keep) for item in value)
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.to(HOST, copy=True) if keep else None


@torch.no_grad()
def copy_full(target: Tensor, values: Tensor) -> None:
    """Overwrites a tensor, which may be sharded, with full `values` of its shape."""
    target.copy_(distribute_like(values, target))


def distribute_like(values: Tensor, like: Tensor) -> Tensor:
    """Full `values`, which every rank has, on the device of `like` and sharded as it is."""
    values = values.to(like.device)
    return distribute_tensor(values, like.device_mesh, like.placements) if isinstance(like, DTensor) else values
