"""Settings of the host's memory allocator."""

from __future__ import annotations

import contextlib
import ctypes


def keep_allocations_in_heap() -> None:
    """Makes glibc reuse large buffers instead of returning them to the system after each operation.

    Fresh pages cost more than the arithmetic on them: point-wise operations run about 1.5 times faster on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):  # other C libraries
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: allocate no buffer by mmap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: return no memory
