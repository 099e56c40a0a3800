"""Number types: what models compute in, and mixed precision."""

from __future__ import annotations

import contextlib
from functools import cache

import torch

from opensora.acceleration.device import is_cpu
from opensora.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "float64": torch.float64}


@cache
def multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this processor."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def inference_dtype(device: torch.device, dtype: str, on_cpu: str = "fp32") -> torch.dtype:
    """The dtype of a model in inference: `dtype`, but `on_cpu` on a CPU unless `dtype` is float64.

    Half precision is slow on most CPUs. Raises ConfigError for bf16 on a CPU that cannot multiply it.
    """
    if not is_cpu(device) or dtype == "float64":
        return DTYPES[dtype]
    if on_cpu == "bf16" and not multiplies_bf16():
        raise ConfigError("this processor has no products of bf16 for cpu_dtype; remove it, or use 'fp32'")
    return DTYPES[on_cpu]


def training_context(device: torch.device, dtype: str) -> contextlib.AbstractContextManager[None]:
    """Mixed precision for a training forward pass in bf16 or fp16; parameters and sums stay in float32."""
    return torch.autocast(device.type, DTYPES[dtype]) if dtype in ("bf16", "fp16") else contextlib.nullcontext()
