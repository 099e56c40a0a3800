"""Choices of speed, tried for a moment on the device at hand: some win on one device and lose on another."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.acceleration.device import place, synchronize
from opensora.acceleration.quantization import KINDS

INPUTS, OUTPUTS = 1152, 4608  # of the layer that is tried, the widest of an XL block
ROWS, ROWS_ON_HOST = 8192, 256  # tokens
HEADS, LENGTH = 16, 1024  # of the attention that is tried
ROUNDS = 3
LOSES = 1.1  # times as long as without the choice, from which on it is worth a word


def linear(kind: str, device: torch.device, dtype: torch.dtype) -> float:
    """How many times as long as the exact layer a linear layer of 8 bits takes."""
    x = torch.ones(_rows(device), INPUTS, device=device, dtype=dtype)
    layers = [nn.Linear(INPUTS, OUTPUTS) for _ in range(2)]
    eight = place(KINDS[kind](layers[0]), device)
    exact = place(nn.Sequential(layers[1].to(dtype)), device)
    return ratio(lambda: eight(x), lambda: exact(x), device)


def products(dtype: torch.dtype, other: torch.dtype, device: torch.device) -> float:
    """How many times as long as in the other type a linear layer takes in this one."""
    work = []
    for one in (dtype, other):
        layer = place(nn.Sequential(nn.Linear(INPUTS, OUTPUTS)).to(one), device)
        work.append(_call(layer, torch.ones(_rows(device), INPUTS, device=device, dtype=one)))
    return ratio(*work, device)


def attention(switch: Callable[[], None], device: torch.device, dtype: torch.dtype) -> float:
    """How many times as long attention takes after `switch` as before."""
    x = torch.ones(1, HEADS, LENGTH, 72, device=device, dtype=dtype)

    def work() -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    before = seconds(work, device)
    switch()
    return seconds(work, device) / before


def ratio(choice: Callable[[], Any], usual: Callable[[], Any], device: torch.device) -> float:
    """How many times as long as the usual work the choice takes."""
    return seconds(choice, device) / seconds(usual, device)


@torch.inference_mode()
def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The least that `work` takes in a few rounds, the first call apart."""
    found = []
    for _ in range(ROUNDS + 1):
        begin = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - begin)
    return min(found[1:])


def _rows(device: torch.device) -> int:
    return ROWS_ON_HOST if device.type == torch.empty(0).device.type else ROWS


def _call(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(x)
