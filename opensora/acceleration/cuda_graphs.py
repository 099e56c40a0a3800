"""Evaluations of a model recorded once and replayed: a device is given one graph instead of a thousand operations.

Where a step is short, as with images and small videos, giving them to an accelerator one after the other takes longer
than they do. The operations are the same, and so are the numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from opensora.acceleration.device import record
from opensora.errors import ConfigError

MOST = 4  # graphs that are kept, each with the memory that it works in


class _Graph(NamedTuple):
    given: list[Any]  # what it reads
    made: Tensor  # and what it fills
    replay: Callable[[], None]


class Recorded:
    """A model that is called as it is, on an accelerator, without gradients; it computes on the device of its latents.

    Calls are of one kind if their arguments differ in nothing but the numbers of tensors. The first of a kind runs as
    it would: libraries choose their kernels, and the model makes what it keeps. The second is recorded.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seen: deque[tuple[Any, _Graph | None]] = deque(maxlen=MOST)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @torch.inference_mode()
    def __call__(self, x: Tensor, timestep: Tensor, **others: Any) -> Tensor:
        values, structure = tree_flatten((x, timestep, others))
        kind = structure, [_kind(value) for value in values]
        found = next((entry for entry in self.seen if entry[0] == kind), None)
        if found is None:
            self.seen.append((kind, None))
            return self.model(x, timestep, **others)
        graph = found[1]
        if graph is None:
            graph = self._record(values, structure, x.device)
            self.seen.remove(found)
            self.seen.append((kind, graph))
        else:
            torch._foreach_copy_(_tensors(graph.given), _tensors(values))
        graph.replay()
        return graph.made.clone()  # the next call fills the same memory

    def _record(self, values: list[Any], structure: TreeSpec, device: torch.device) -> _Graph:
        given = [value.clone() if isinstance(value, Tensor) else value for value in values]
        x, timestep, others = tree_unflatten(given, structure)
        try:
            replay, made = record(lambda: self.model(x, timestep, **others), device)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:150]
            raise ConfigError(f"this model cannot be recorded here ({reason}); leave --graphs out") from error
        return _Graph(given, made, replay)


def _kind(value: Any) -> Any:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value


def _tensors(values: list[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]
