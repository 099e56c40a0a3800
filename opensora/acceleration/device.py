"""The only module that names devices: what is there, which dtype runs on it, and how to place a model."""

from __future__ import annotations

import contextlib
import ctypes

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from opensora.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "float64": torch.float64}


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the accelerator that is there, or the CPU. Raises ConfigError if it is not here."""
    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device '{name}' cannot be used here; this machine has '{pick_device().type}'") from error
    return device


def inference_dtype(device: torch.device, dtype: str) -> torch.dtype:
    """The dtype models compute in: on a CPU float32 (half types are slower there or rounder), else as asked."""
    return torch.float32 if device.type == "cpu" and dtype != "float64" else DTYPES[dtype]


def training_context(device: torch.device, dtype: str) -> contextlib.ExitStack:
    """What a training step runs under: mixed precision and the attention kernels that suit the device.

    In bf16 and fp16 matrix products take that type; parameters and sums stay in float32. On a CPU the backward pass
    of fused attention is slower than plain matrix products at small sizes.
    """
    context = contextlib.ExitStack()
    if dtype in ("bf16", "fp16"):
        context.enter_context(torch.autocast(device.type, DTYPES[dtype]))
    if device.type == "cpu":
        context.enter_context(sdpa_kernel(SDPBackend.MATH))
    return context


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on its device, with the formulation of its operations that suits it."""
    for module in model.modules():
        if hasattr(module, "fold_time"):
            module.fold_time = device.type == "cpu"
    return model.to(device)


def keep_allocations_in_heap() -> None:
    """Makes glibc reuse large buffers instead of returning them to the system after each operation.

    Fresh pages cost more than the arithmetic on them: point-wise operations run about 1.5 times faster on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):  # elsewhere there is no glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: take no buffer from mmap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give none back
