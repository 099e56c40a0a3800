"""Short timings of options that are faster on some devices and slower on others."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.acceleration.device import is_cpu, synchronize
from opensora.acceleration.placement import to_device
from opensora.acceleration.quantization import KINDS

INPUTS, OUTPUTS = 1152, 4608  # of the timed layer, the widest of an XL block
TOKENS, TOKENS_ON_CPU = 8192, 256  # of the timed layer
HEADS, LENGTH = 16, 1024  # of the timed attention
ROUNDS = 3
SLOWER = 1.1  # from this ratio on an option is reported as slower


def linear(kind: str, device: torch.device, dtype: torch.dtype) -> float:
    """The duration of an 8-bit linear layer, relative to the exact one."""
    x = torch.ones(_tokens(device), INPUTS, device=device, dtype=dtype)
    layers = [nn.Linear(INPUTS, OUTPUTS) for _ in range(2)]
    eight = to_device(KINDS[kind](layers[0]), device)
    exact = to_device(nn.Sequential(layers[1].to(dtype)).requires_grad_(False), device)
    return ratio(lambda: eight(x), lambda: exact(x), device)


def products(dtype: torch.dtype, other: torch.dtype, device: torch.device) -> float:
    """The duration of a linear layer in `dtype`, relative to the other dtype."""
    work = []
    for one in (dtype, other):
        layer = to_device(nn.Sequential(nn.Linear(INPUTS, OUTPUTS)).to(one).requires_grad_(False), device)
        work.append(_call(layer, torch.ones(_tokens(device), INPUTS, device=device, dtype=one)))
    return ratio(*work, device)


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


def _tokens(device: torch.device) -> int:
    return TOKENS_ON_CPU if is_cpu(device) else TOKENS


def _call(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(x)
