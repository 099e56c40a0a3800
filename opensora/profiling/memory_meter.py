"""Memory of devices and of the host: free, used, peak, limits, and errors for lack of it."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from opensora.acceleration.device import device_name, is_cpu, synchronize

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
CGROUP = Path("/sys/fs/cgroup")  # of a container, with its own limit
SHARE = 0.9  # of the free memory of a host that a process may take


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of an accelerator or of the host is exhausted."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


class MemoryMeter:
    """Measures the peak memory of an accelerator; unknown on a CPU, and on devices that record none."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, _accounts(device)
        if self.module is not None:
            free, self.total = self.module.mem_get_info(device)
            self.room = free + self.module.memory_reserved(device)  # other processes have the rest

    def reset(self) -> None:
        """Empties the caches and starts a new peak."""
        gc.collect()
        if self.module is not None:
            self.module.empty_cache()
            self.module.reset_peak_memory_stats(self.device)

    def peak(self) -> float | None:
        """Peak bytes allocated, as a share of the memory that this process can have."""
        return None if self.module is None else self.module.max_memory_allocated(self.device) / self.room

    def wait(self) -> None:
        """Synchronizes the device."""
        synchronize(self.device)

    def __str__(self) -> str:
        """The device in words."""
        name = device_name(self.device)
        return name if self.module is None else f"{name}, {self.total / 2**30:.0f} GiB"


def _accounts(device: torch.device) -> ModuleType | None:
    """The torch module of a device, if it reports its memory."""
    if is_cpu(device):
        return None
    module = torch.get_device_module(device)
    needed = ("mem_get_info", "memory_reserved", "max_memory_allocated", "reset_peak_memory_stats", "empty_cache")
    return module if all(hasattr(module, name) for name in needed) else None


@contextlib.contextmanager
def bounded_host_memory(room: int | None = None) -> Iterator[None]:
    """Within it, allocations beyond `room` more bytes raise an error instead of ending the process; on Linux only.

    By default `room` is most of the free memory.
    """
    try:
        import resource

        used = _kilobytes(Path("/proc/self/status"), "VmData") * 1024
        room = int(SHARE * free_on_host()) if room is None else room
        before = resource.getrlimit(resource.RLIMIT_DATA)
        most = used + room if before[1] == resource.RLIM_INFINITY else min(used + room, before[1])
        resource.setrlimit(resource.RLIMIT_DATA, (most, before[1]))
    except (ImportError, OSError, ValueError, KeyError):  # no such system
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def available_memory(device: torch.device) -> int | None:
    """Free bytes of a device; on a CPU, of the host. None if unknown."""
    if not is_cpu(device):
        get_info = getattr(torch.accelerator, "get_memory_info", None)
        return get_info(device)[0] if get_info else None
    with contextlib.suppress(OSError, KeyError):
        return free_on_host()
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def resident_memory() -> int:
    """Resident bytes of this process; a guess if the system does not say."""
    with contextlib.suppress(OSError, KeyError):
        return _kilobytes(Path("/proc/self/status"), "VmRSS") * 1024
    return 600 * 2**20


def free_on_host() -> int:
    """Free bytes of the host or of the container; cached files count as free.

    Raises OSError or KeyError if the system does not say.
    """
    free = _kilobytes(Path("/proc/meminfo"), "MemAvailable") * 1024
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        parts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(parts.get("inactive_file", 0)))
    return max(free, 0)


def _kilobytes(file: Path, key: str) -> int:
    """A line `key:  123 kB` of a file. Raises KeyError if there is none."""
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    return int(lines[key].split()[0])
