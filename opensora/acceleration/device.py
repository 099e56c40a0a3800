"""The only module that asks for kinds of devices: which one a process uses, its memory and name."""

from __future__ import annotations

import contextlib
import importlib
import platform
import sys
from functools import cache

import torch

from opensora.acceleration.device_names import PACKAGES, check_device_name
from opensora.errors import ConfigError

HOST = torch.device("cpu")


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, current from now on; by default the accelerator, else the CPU.

    Raises ConfigError if it is not available.
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    check_device_name(name)
    _import_backend(name.partition(":")[0])
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError) as error:
        raise ConfigError(_missing(name)) from error
    if device.index is not None:
        _make_current(device)
    return device


def _import_backend(kind: str) -> None:
    """Imports the package that adds a kind of device to PyTorch, if there is one. Raises ConfigError."""
    package = PACKAGES.get(kind)
    if package is None:
        return
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise ConfigError(f"device '{kind}': {package} needs '{error.name}', which is not installed") from error
        remedy = "install the one that was built for this version of PyTorch, or use --device cpu"
        version = torch.__version__
        raise ConfigError(f"device '{kind}' needs the package {package}; {remedy} (PyTorch {version})") from error
    except Exception as error:  # a package for another version, or without its driver, raises anything
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(f"device '{kind}': {package} is installed but cannot be used ({reason})") from error


def _missing(name: str) -> str:
    kind, here = name.partition(":")[0], pick_device().type
    text = f"device '{name}' cannot be used here; this machine has '{here}'"
    if kind != here and kind != "cpu" and PACKAGES[kind] is None:
        return f"{text}; it needs a PyTorch that was built for {kind}, its driver and the device itself"
    return text


def with_index(device: torch.device) -> torch.device:
    """The device that a kind stands for now: it stays the same when another one becomes current."""
    module = None if is_cpu(device) else torch.get_device_module(device)
    if device.index is not None or not hasattr(module, "set_device"):
        return device
    return torch.device(device.type, module.current_device())


def available_devices() -> list[str]:
    """The names of the accelerators of this machine; the CPU where there is none."""
    if not torch.accelerator.is_available():
        return [str(HOST)]
    kind = pick_device().type
    return [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]


def is_cpu(device: torch.device) -> bool:
    """Whether a device is the host's processor."""
    return device.type == "cpu"


def shares_host_memory(device: torch.device) -> bool:
    """Whether a device computes in the host's memory."""
    return device.type in ("cpu", "mps")


def set_device(device: torch.device, local_rank: int, share: bool = False) -> torch.device:
    """Makes device number `local_rank`, of the kind of `device`, the current one of this process; returns it.

    With `share`, processes beyond the number of devices share them. Raises ConfigError if there are fewer devices, or
    if `device` has an index.
    """
    if is_cpu(device):
        return device
    if device.index is not None:
        remedy = f"use '{device.type}': each process takes its own"
        raise ConfigError(f"device '{device}' is one device, but torchrun started several processes; {remedy}")
    count = torch.get_device_module(device).device_count()
    if local_rank >= count and not share:
        raise ConfigError(
            f"rank {local_rank} of this machine has no device; start {count} with --nproc_per_node {count}"
        )
    own = torch.device(device.type, local_rank % count)
    _make_current(own)
    return own


def _make_current(device: torch.device) -> None:
    """What names no device of its own, such as an event or a kernel's stream, belongs to the current one."""
    module = None if is_cpu(device) else torch.get_device_module(device)
    if hasattr(module, "set_device"):  # some back ends have a single device
        module.set_device(device.index)


def _numbered(device: torch.device) -> tuple[torch.device, ...]:
    """The argument for functions of a device module, whose default is the current device."""
    single = not hasattr(torch.get_device_module(device), "set_device")
    return () if single or device.index is None else (device,)


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if not is_cpu(device):
        torch.get_device_module(device).synchronize(*_numbered(device))


def record_event(device: torch.device) -> torch.Event:
    """An event behind the work that is queued on an accelerator. Raises RuntimeError where there are no events."""
    event = torch.Event(device.type)
    event.record(*(() if device.index is None else (torch.accelerator.current_stream(device),)))
    return event


def reset_peak_memory(device: torch.device) -> None:
    """Resets the peak that `peak_memory` reads, on devices that record one."""
    module = None if is_cpu(device) else torch.get_device_module(device)
    if hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats(*_numbered(device))


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes allocated on a device; on a CPU, of this process. None if unknown."""
    if is_cpu(device):
        with contextlib.suppress(ImportError):
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return None
    module = torch.get_device_module(device)
    return int(module.max_memory_allocated(*_numbered(device))) if hasattr(module, "max_memory_allocated") else None


def device_name(device: torch.device) -> str:
    """The name of a device for people: an accelerator's model, or a processor and its number of threads."""
    if is_cpu(device):
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(get_name(device)) if get_name else device.type


@cache
def fastest_adamw(device: torch.device) -> dict[str, bool]:
    """The keywords of the fastest AdamW on a device: fused where it exists, else foreach."""
    try:
        trial = torch.zeros(1, device=device).requires_grad_()
        trial.grad = torch.zeros_like(trial)
        torch.optim.AdamW([trial], fused=True).step()
    except (RuntimeError, NotImplementedError):
        return {"fused": False, "foreach": True}
    return {"fused": True, "foreach": False}
