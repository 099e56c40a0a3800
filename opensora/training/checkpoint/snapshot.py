"""A copy of a run's state in host memory, so that training continues while it is written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora.distributed.full_state_dict import full_state_dict
from opensora.distributed.process_group import RankLayout
from opensora.models.lora import LoRAWeights
from opensora.training.adapter import adapter_of, trained_state
from opensora.training.ema import EMA


class Snapshot(NamedTuple):
    """The full state dicts of a checkpoint, in host memory. With an adapter, `model` and `ema` are of it alone."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]  # {"optimizer": ..., "scaler": ...}
    adapter: LoRAWeights | None = None  # `model` as an adapter file holds it

    @property
    def num_bytes(self) -> int:
        """The size of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(self[:3]))


def take_snapshot(
    model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, layout: RankLayout,
    base: str | None = None,
) -> Snapshot | None:  # fmt: skip
    """Gathers the full state on the main rank; None on the others. All ranks call this together.

    base: SHA-256 of the weights that an adapter belongs to
    """
    rest = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    own, averaged, others = (full_state_dict(part, layout) for part in (trained_state(model), ema.state_dict(), rest))
    return Snapshot(own, averaged, others, adapter_of(model, own, base)) if layout.is_main else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from _tensors(item)
