"""Asynchronous copies between host and device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from opensora.acceleration.device import HOST, is_cpu, record_event, shares_host_memory

Batch = TypeVar("Batch")


def is_asynchronous(device: torch.device) -> bool:
    """Whether a device runs behind the host and records events."""
    if is_cpu(device):
        return False
    try:
        record_event(device)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def read_async(numbers: Tensor) -> Callable[[], list[float]]:
    """Starts copying a tensor to the host; the returned function waits for that copy alone and gives its values."""
    if not is_asynchronous(numbers.device):
        return numbers.tolist
    on_host = numbers.to(HOST, non_blocking=True)
    copied = record_event(numbers.device)

    def read() -> list[float]:
        copied.synchronize()
        return on_host.tolist()

    return read


def pin_memory_for(device: torch.device) -> Callable[[Batch], Batch]:
    """A function that pins a batch's tensors, so that copies to `device` with non_blocking=True do not wait.

    It returns the batch unchanged where the device shares the host's memory or nothing can be pinned.
    """
    if shares_host_memory(device):
        return lambda batch: batch
    try:
        torch.empty(1).pin_memory()
    except (RuntimeError, NotImplementedError):
        return lambda batch: batch
    return lambda batch: tree_map_only(Tensor, _pinned, batch)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if is_cpu(tensor.device) else tensor
