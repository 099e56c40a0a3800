"""Finds NaN and infinity in weights, in one pass."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from opensora.acceleration.packed_tensor import PackedTensor
from opensora.checkpoints.tensor_threads import map_tensors

_COMPARED = {torch.float64, torch.float32, torch.float16, torch.bfloat16}  # others are compared in float32


def largest(tensor: Tensor) -> float:
    """The largest absolute value of a tensor; NaN if it contains NaN."""
    if isinstance(tensor, PackedTensor):
        found = [largest(part) for part in tensor.chunks()]
        return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor if tensor.dtype in _COMPARED else tensor.float())
    return max(abs(low.item()), abs(high.item()))


def magnitudes(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest absolute value of each tensor. Packed ones take turns: each is unpacked piece by piece."""
    packed = {name: largest(tensor) for name, tensor in tensors.items() if isinstance(tensor, PackedTensor)}
    plain = {name: tensor for name, tensor in tensors.items() if name not in packed}
    found = packed | map_tensors(lambda name: largest(plain[name]), plain)
    return {name: found[name] for name in tensors}


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that contain NaN or infinity."""
    return [name for name, value in magnitudes(tensors).items() if not math.isfinite(value)]
