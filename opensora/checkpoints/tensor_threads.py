"""One function of every tensor of a checkpoint, the large ones on several threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

LARGE = 2**16  # elements; handing a smaller tensor to a thread takes longer than the work
Result = TypeVar("Result")


def map_tensors(function: Callable[[str], Result], tensors: Mapping[str, Tensor]) -> dict[str, Result]:
    """`function` of the name of each tensor."""
    large = [name for name, tensor in tensors.items() if tensor.numel() >= LARGE]
    found = {name: function(name) for name, tensor in tensors.items() if tensor.numel() < LARGE}
    if large:
        with ThreadPoolExecutor() as pool:
            found |= zip(large, pool.map(function, large), strict=True)
    return found
