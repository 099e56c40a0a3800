"""Short timings of options that are faster on some devices and slower on others."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.acceleration.device import is_cpu, synchronize
from opensora.acceleration.quantization import KINDS

LAYER = (8192, 1152, 4608)  # tokens, inputs and outputs of the timed layer, the widest of an XL block
LAYER_ON_CPU = (32, 1152, 1152)  # takes milliseconds, even without fast 8-bit products
HEADS, LENGTH = 16, 1024  # of the timed attention
ROUNDS = 3
SLOWER = 1.1  # from this ratio on an option is reported as slower


def linear(kind: str, device: torch.device, dtype: torch.dtype) -> float:
    """The duration of an 8-bit linear layer, relative to the exact one."""
    exact, x = _layer(device, dtype)
    quantized = KINDS[kind](exact).to(device)
    return ratio(lambda: quantized(x), lambda: exact(x), device)


def products(dtype: torch.dtype, other: torch.dtype, device: torch.device) -> float:
    """The duration of a linear layer in `dtype`, relative to the other dtype."""
    (layer, x), (usual, other_x) = _layer(device, dtype), _layer(device, other)
    return ratio(lambda: layer(x), lambda: usual(other_x), device)


def attention(switch: Callable[[], None], device: torch.device, dtype: torch.dtype) -> float:
    """The duration of attention after `switch`, relative to before."""
    x = torch.ones(1, HEADS, LENGTH, 72, device=device, dtype=dtype)

    def work() -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    before = seconds(work, device)
    switch()
    return seconds(work, device) / before


def ratio(choice: Callable[[], Any], usual: Callable[[], Any], device: torch.device) -> float:
    """The duration of `choice`, relative to `usual`."""
    return seconds(choice, device) / seconds(usual, device)


@torch.inference_mode()
def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The shortest duration of `work` in a few rounds, after a warm-up."""
    found = []
    for _ in range(ROUNDS + 1):
        begin = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - begin)
    return min(found[1:])


def _layer(device: torch.device, dtype: torch.dtype) -> tuple[nn.Linear, Tensor]:
    """The timed layer, and its input."""
    tokens, inputs, outputs = LAYER_ON_CPU if is_cpu(device) else LAYER
    layer = nn.Linear(inputs, outputs, device=device, dtype=dtype)
    return layer, torch.ones(tokens, inputs, device=device, dtype=dtype)
