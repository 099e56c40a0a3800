"""Peak speed of matrix products on a device."""

from __future__ import annotations

import re
import time
from functools import cache

import torch

from opensora.acceleration.device import device_name, is_cpu, synchronize
from opensora.acceleration.precision import DTYPES

# TFLOP/s of dense bf16 and fp16 products with fp32 accumulation, from the vendors' data sheets.
STATED = {
    "GB200": 2500, "B200": 2250, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "H800": 989, "H20": 148,
    "A100": 312, "A800": 312, "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "RTX 4090": 165, "RTX 3090": 71,
    "MI300X": 1307,
}  # fmt: skip
SECONDS, ROUNDS = 0.02, 5  # minimum duration of a measurement, number of measurements


@cache
def peak_flops(device: torch.device, dtype: str) -> float:
    """FLOP/s of products in `dtype` (a key of DTYPES): from the data sheet of a known device, else measured."""
    stated = _stated(device_name(device)) if dtype in ("bf16", "fp16") else None
    return stated or _measured(device, DTYPES[dtype])


def known_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """The peak FLOP/s of a CPU (measured) or of an accelerator with a known data sheet; None for others."""
    name = next(name for name, one in DTYPES.items() if one == dtype)
    if is_cpu(device):
        return peak_flops(device, name)
    return _stated(device_name(device)) if name in ("bf16", "fp16") else None


def _stated(name: str) -> float | None:
    """FLOP/s of a device of this name, or None."""
    found = (peak for known, peak in STATED.items() if re.search(rf"\b{known}\b", name))
    return 1e12 * peak if (peak := next(found, None)) else None


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    side = 1024 if is_cpu(device) else 8192
    one = torch.ones(side, side, device=device, dtype=dtype)

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            one @ one
        synchronize(device)
        return time.perf_counter() - begin

    seconds(1)  # starts threads and loads kernels
    count = max(int(SECONDS / seconds(1)), 1)
    return 2.0 * side**3 * count / min(seconds(count) for _ in range(ROUNDS))
