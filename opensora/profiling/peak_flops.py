"""How fast a device multiplies matrices at best."""

from __future__ import annotations

import re
import time
from functools import cache

import torch

from opensora.acceleration.device import DTYPES, synchronize

# 10^12 operations a second of dense products in bf16 and fp16, summed in fp32, as the makers state them.
STATED = {
    "GB200": 2500, "B200": 2250, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "H800": 989, "H20": 148,
    "A100": 312, "A800": 312, "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "RTX 4090": 165, "RTX 3090": 71,
    "MI300X": 1307,
}  # fmt: skip
SECONDS, ROUNDS = 0.02, 5  # that a measurement takes at least, and how many there are


@cache
def peak_flops(device: torch.device, dtype: str) -> float:
    """Operations a second: what the maker states for a device that is known by name, else the best of some trials.

    `dtype` is that of the products, as settings have it.
    """
    stated = _stated(_name(device)) if dtype in ("bf16", "fp16") else None
    return stated or _measured(device, DTYPES[dtype])


def known_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """The peak as its maker states it, or as a trial of a moment finds it on a host; None for other devices."""
    name = next(name for name, one in DTYPES.items() if one == dtype)
    if device.type == torch.empty(0).device.type:
        return peak_flops(device, name)
    return _stated(_name(device)) if name in ("bf16", "fp16") else None


def _name(device: torch.device) -> str:
    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return ask(device) if ask else ""


def _stated(name: str) -> float | None:
    """Of a device of this name, or None."""
    found = (peak for known, peak in STATED.items() if re.search(rf"\b{known}\b", name))
    return 1e12 * peak if (peak := next(found, None)) else None


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    on_host = device.type == torch.empty(0).device.type
    side = 1024 if on_host else 8192
    one = torch.ones(side, side, device=device, dtype=dtype)

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            one @ one
        synchronize(device)
        return time.perf_counter() - begin

    seconds(1)  # pays for the start of threads and kernels
    count = max(int(SECONDS / seconds(1)), 1)
    return 2.0 * side**3 * count / min(seconds(count) for _ in range(ROUNDS))
