"""A backend from outside of PyTorch, made up: importing it gives PyTorch a device "gcu" that computes on the host.

PyTorch's slot for such backends gets the name; whatever is asked of the device is done on the CPU. It cannot be
undone, so this is imported by a process of its own. `CALLS` counts what was asked of its module.
"""

from __future__ import annotations

import types
from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CALLS: Counter[str] = Counter()
HOST = torch.device("cpu")


def _here(value: Any) -> Any:
    """`value` with the host for the made-up device."""
    if isinstance(value, torch.device) and value.type == "gcu":
        CALLS["placed"] += 1
        return HOST
    if isinstance(value, str) and value.partition(":")[0] == "gcu":
        CALLS["placed"] += 1
        return HOST
    return value


class _OnHost(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = {name: _here(value) for name, value in (kwargs or {}).items()}
        return func(*(_here(value) for value in args), **kwargs)


def _counted(name: str, result: Any = None) -> Any:
    def called(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        return result

    return called


torch.utils.rename_privateuse1_backend("gcu")
module = types.ModuleType("torch.gcu")
for _name, _result in {
    "is_available": True, "device_count": 1, "current_device": 0, "synchronize": None, "empty_cache": None,
    "is_initialized": True, "_is_in_bad_fork": False, "manual_seed_all": None, "get_amp_supported_dtype": [],
    "max_memory_allocated": 12 * 2**20, "reset_peak_memory_stats": None, "get_device_name": "made-up GCU",
    "mem_get_info": (2**34, 2**34), "memory_reserved": 0,
}.items():  # fmt: skip
    setattr(module, _name, _counted(_name, _result))
torch._register_device_module("gcu", module)
torch.accelerator.get_memory_info = _counted("get_memory_info", (2**34, 2**34))  # PyTorch would ask its allocator
_OnHost().__enter__()
