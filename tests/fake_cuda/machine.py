"""Two CUDA devices that compute nothing: fake tensors on "cuda:0" and "cuda:1", and a log of what the host waited for.

Fake tensors have shape, dtype and device, and no memory, so models of any size run. The host's own tensors are real.
An operation on tensors of two devices raises, and so do `item()` and `bool()` of a tensor on a device, for which the
host would wait. What cannot run here:

| what | why |
|---|---|
| the backward pass | the autograd engine starts a thread for the device, which asks the driver |
| autocast | it is switched off where no device is available |
| kernels | they have shapes here and no numbers; attention takes the plain formulation |
| CUDA graphs, streams, peak memory | they belong to the driver; calls of `torch.cuda` are logged instead |
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

SOURCE = Path(__file__).with_name("guard.cpp")
TORCH = Path(torch.__file__).parent


def build_guard(folder: Path) -> Path:
    """The compiled device guard: one file in `folder` for each version of PyTorch and of the source.

    Skips the test where there is no compiler. Two workers may build at once: each renames its own file into place.
    """
    key = hashlib.sha256(f"{torch.__version__} {sys.version}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    library = folder / f"guard-{key}.so"
    if library.exists():
        return library
    if (compiler := shutil.which("g++") or shutil.which("clang++")) is None:
        pytest.skip("fake CUDA devices take a C++ compiler, and there is none")
    own = library.with_suffix(f".{os.getpid()}")
    command = [compiler, "-shared", "-fPIC", "-std=c++20", f"-I{TORCH / 'include'}", str(SOURCE), "-o", str(own)]
    done = subprocess.run([*command, f"-L{TORCH / 'lib'}", "-lc10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return own.rename(library)


class FakeMachine:
    """What programs ask of the devices. `calls` logs functions of `torch.cuda` with the device that they name."""

    def __init__(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.set_current(0)
        self.calls: list[tuple[str, str | None]] = []
        self.waits: list[str] = []
        self._pinned: set[int] = set()  # storages
        self._keep: list[Tensor] = []  # so that no storage gets the number of another
        self._replace(monkeypatch)

    def _replace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = {"synchronize": None, "reset_peak_memory_stats": None, "max_memory_allocated": 2**20,
                   "get_device_name": "made-up", "empty_cache": None}  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, self._logged(name, answer))
        monkeypatch.setattr(torch.cuda, "set_device", self._set_device)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.accelerator, "current_stream", torch.Stream)
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: self._pin(tensor))
        monkeypatch.setattr(nn.Module, "_apply", replace_tensors)

    def _logged(self, name: str, answer: Any) -> Callable[..., Any]:
        def called(device: Any = None) -> Any:
            self.calls.append((name, None if device is None else str(device)))
            return answer

        return called

    def _set_device(self, device: Any) -> None:
        self.library.set_current(device if isinstance(device, int) else torch.device(device).index)

    def _pin(self, tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        self._pinned.add(pinned.untyped_storage()._cdata)
        self._keep.append(pinned)
        return pinned

    @property
    def current(self) -> int:
        """The number of the current device."""
        return self.library.current_device()

    @property
    def recorded(self) -> int:
        """The number of the device whose stream recorded the latest event."""
        return self.library.recorded_on()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it tensors are fake and the devices are there; `waits` lists what the host waits for."""
        with FakeTensorMode(allow_non_fake_inputs=True), _Host(self):
            yield

    def copied(self, source: Tensor, target: torch.device, non_blocking: bool) -> None:
        """Notes a copy between two devices, if the host waits for it."""
        pinned = source.untyped_storage()._cdata in self._pinned
        if source.device != target and not (non_blocking and (pinned or target.type == "cpu")):
            memory = "" if pinned or source.is_cuda else "pageable "
            self.waits.append(f"{memory}{source.device} {list(source.shape)} -> {target}")


class _Host(TorchDispatchMode):
    """Computes what concerns the host alone with real tensors, and notes the copies for which it waits."""

    def __init__(self, machine: FakeMachine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        target = kwargs.get("device")
        if all(type(one) is not FakeTensor and one.is_cpu for one in tensors) and str(target or "cpu") == "cpu":
            with _disable_current_modes():
                return func(*args, **kwargs)
        later = kwargs.get("non_blocking", False)
        if func is torch.ops.aten._to_copy.default:
            self.machine.copied(args[0], torch.device(target or args[0].device), later)
        elif func is torch.ops.aten.copy_.default:
            self.machine.copied(args[1], args[0].device, args[2] if len(args) > 2 else later)
        return func(*args, **kwargs)


def replace_tensors(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` with new parameters in place of those that it would change: fake ones cannot be swapped."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                module._parameters[name] = nn.Parameter(function(parameter), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module
