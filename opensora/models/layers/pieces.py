"""Computation piece by piece, which takes less memory than all at once.

A `TorchFunctionMode` can override these functions, as it can override torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def concatenated(function: Callable[[Tensor], Tensor], pieces: Iterable[Tensor], dim: int = 0) -> Tensor:
    """The results of a function of each piece, joined along an axis."""
    given: tuple[Any, ...] = (pieces,)
    if has_torch_function(given):
        return handle_torch_function(concatenated, given, function, pieces, dim)
    return torch.cat([function(piece) for piece in pieces], dim)


def one_by_one(function: Callable[[Tensor], Tensor], pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The results of a function of each piece, computed when they are asked for."""
    given: tuple[Any, ...] = (pieces,)
    if has_torch_function(given):
        return handle_torch_function(one_by_one, given, function, pieces)
    return map(function, pieces)
