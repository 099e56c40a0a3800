"""Small things that ranks tell one another from host to host, while their devices go on."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from opensora.acceleration.parallel import Layout

T = TypeVar("T")


class HostGroup:
    """All ranks, connected from host to host; they make it together, and call its methods together."""

    def __init__(self, layout: Layout) -> None:
        self.ranks = layout.world_size
        self._group = dist.new_group(backend="gloo") if self.ranks > 1 else None

    def numbers(self, *values: float) -> Tensor:
        """The numbers of all ranks in their order, float64 [ranks, N]."""
        own = torch.tensor(values, dtype=torch.float64)
        if self.ranks == 1:
            return own[None]
        found = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(found, own, group=self._group)
        return torch.stack(found)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in their order; any objects that can be pickled."""
        if self.ranks == 1:
            return [value]
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, value, group=self._group)
        return found
