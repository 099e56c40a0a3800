"""Collectives over the ranks of a run. A single process returns its own values at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from opensora.distributed.process_group import RankLayout, host_group
from opensora.errors import OpenSoraError

T = TypeVar("T")


def barrier(layout: RankLayout) -> None:
    """Waits until all ranks are here, up to a day."""
    if layout.world_size > 1:
        dist.barrier(group=host_group(long_wait=True))


def run_on_main(function: Callable[[], T], layout: RankLayout) -> T:
    """Runs a function on the main rank alone, up to a day, and broadcasts its result.

    Its OpenSoraError is raised on all ranks.
    """
    if layout.world_size == 1:
        return function()
    result: Any = None
    if layout.is_main:
        try:
            result = function()
        except OpenSoraError as error:
            result = error
    barrier(layout)
    result = broadcast_object(result, layout)
    if isinstance(result, OpenSoraError):
        raise result
    return result


def all_reduce_sum(values: Sequence[float], layout: RankLayout) -> list[float]:
    """The sums over all ranks of a few numbers on the host; no device is synchronized."""
    if layout.world_size == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(numbers, group=host_group())
    return numbers.tolist()


def all_reduce_mean(tensor: Tensor, layout: RankLayout) -> Tensor:
    """The mean of a tensor over all ranks; the ranks of a sequence hold the same, so it is the mean over the data."""
    if layout.world_size == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / layout.world_size


def broadcast_object(value: T, layout: RankLayout) -> T:
    """The main rank's `value`, a picklable object, on every rank."""
    if layout.world_size == 1:
        return value
    box: list[Any] = [value if layout.is_main else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_objects(value: T, layout: RankLayout) -> list[T]:
    """The picklable values of all ranks in their order, on every rank."""
    if layout.world_size == 1:
        return [value]
    values: list[Any] = [None] * layout.world_size
    dist.all_gather_object(values, value)
    return values
