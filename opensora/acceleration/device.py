"""The only module that names devices: what is there, which dtype runs on it, and how to place a model."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import platform
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from opensora.acceleration.kernels.attention import use_host_attention
from opensora.acceleration.kernels.layout import channels_last, leave_file, outputs_last
from opensora.acceleration.kernels.linear import multiplies_bf16, use_onednn
from opensora.acceleration.kernels.modulation import use_host_modulation
from opensora.acceleration.kernels.residual import fuse_residuals
from opensora.acceleration.kernels.upsample import fuse_upsampling
from opensora.acceleration.kernels.winograd import use_winograd
from opensora.errors import ConfigError, did_you_mean

# Kind of device -> the package that brings it, where PyTorch itself does not.
PACKAGES = {"cpu": None, "cuda": None, "mps": None, "xpu": None, "npu": "torch_npu", "gcu": "torch_gcu"}
Batch = TypeVar("Batch")
Made = TypeVar("Made")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "float64": torch.float64}


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the accelerator that is there, or the CPU. Raises ConfigError if it is not here."""
    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    _import_backend(name.partition(":")[0])
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError) as error:
        raise ConfigError(_missing(name)) from error
    return device


def _import_backend(kind: str) -> None:
    """Imports the package of a kind of device that PyTorch does not know by itself. Raises ConfigError."""
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
    if kind not in PACKAGES:
        return f"{text}; known are {', '.join(PACKAGES)}{did_you_mean(kind, PACKAGES)}"
    if kind != here and kind != "cpu" and PACKAGES[kind] is None:
        return f"{text}; it needs a PyTorch that was built for {kind}, its driver and the device itself"
    return text


def take_own(device: torch.device, number: int, share: bool = False) -> None:
    """Makes device `number` of this machine, of the kind of `device`, the current one of this process.

    Raises ConfigError where there are fewer, unless processes may `share` them, or where one of them is named.
    """
    if device.type == "cpu":
        return
    if device.index is not None:
        remedy = f"name just '{device.type}': each process takes its own"
        raise ConfigError(f"device '{device}' is a single one, but torchrun has started several processes; {remedy}")
    module = torch.get_device_module(device)
    there = module.device_count()
    if number >= there and not share:
        raise ConfigError(f"rank {number} of this machine has no device; start {there} with --nproc_per_node {there}")
    if hasattr(module, "set_device"):  # else there is only one
        module.set_device(number % there)


def synchronize(device: torch.device) -> None:
    """Returns when a device has done all that it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak, where a device keeps accounts."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    if hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that were allocated at once on a device, of this process on a host; None where nobody says."""
    if device.type == "cpu":
        with contextlib.suppress(ImportError):
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return None
    module = torch.get_device_module(device)
    return int(module.max_memory_allocated()) if hasattr(module, "max_memory_allocated") else None


def name_of(device: torch.device) -> str:
    """A device in words: its own name, or how many threads compute."""
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(ask()) if ask else device.type


def inference_dtype(device: torch.device, dtype: str, on_cpu: str = "fp32") -> torch.dtype:
    """The dtype models compute in: on a CPU `on_cpu` (half types are slow on most) or float64, else as asked.

    Raises ConfigError for bf16 on a CPU without products for it.
    """
    if device.type != "cpu" or dtype == "float64":
        return DTYPES[dtype]
    if on_cpu == "bf16" and not multiplies_bf16():
        raise ConfigError("this processor has no products of bf16 for cpu_dtype; leave it out, or use 'fp32'")
    return DTYPES[on_cpu]


def training_context(device: torch.device, dtype: str) -> contextlib.ExitStack:
    """What the forward pass of training runs under: mixed precision and the attention kernels that suit the device.

    In bf16 and fp16 matrix products take that type; parameters and sums stay in float32.
    """
    context = contextlib.ExitStack()
    if dtype in ("bf16", "fp16"):
        context.enter_context(torch.autocast(device.type, DTYPES[dtype]))
    context.enter_context(training_attention(device))
    return context


def training_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The attention kernels alone: for the backward pass, which computes checkpointed blocks again as they were.

    On a CPU the backward pass of fused attention is slower than plain matrix products at small sizes.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def use_attention(name: str | None) -> None:
    """Has PyTorch's attention call the kernels of an installed package, by its name in PyTorch; None: as it is.

    Raises ConfigError if this PyTorch does not know it, or its package is not there or not for this device.
    """
    if name is None:
        return
    known = getattr(attention, "list_flash_attention_impls", list)()
    if name not in known:
        remedy = f"it knows {', '.join(known)}" if known else "use a later one"
        raise ConfigError(f"attention '{name}' is not known to PyTorch {torch.__version__}; {remedy}")
    try:
        attention.activate_flash_attention_impl(name)
    except Exception as error:  # the package and what it needs raise anything
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(f"attention '{name}' cannot be used here ({reason}); leave it out") from error


@cache
def optimizer_kernels(device: torch.device) -> dict[str, bool]:
    """The keywords by which AdamW is fastest on a device: one kernel for all of a step, or one for each operation."""
    try:
        trial = torch.zeros(1, device=device).requires_grad_()
        trial.grad = torch.zeros_like(trial)
        torch.optim.AdamW([trial], fused=True).step()
    except (RuntimeError, NotImplementedError):
        return {"fused": False, "foreach": True}
    return {"fused": True, "foreach": False}


def runs_ahead(device: torch.device) -> bool:
    """Whether a device works off what it is given while the program goes on, and tells when it has done a part."""
    if device.type == "cpu":
        return False
    try:
        torch.Event(device.type).record()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def read_later(numbers: Tensor) -> Callable[[], list[float]]:
    """What gives a tensor's numbers, and waits only for what its device was given before this call."""
    if not runs_ahead(numbers.device):
        return numbers.tolist
    there = numbers.to("cpu", non_blocking=True)
    copied = torch.Event(numbers.device.type)
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return there.tolist()

    return read


def record(work: Callable[[], Made], device: torch.device) -> tuple[Callable[[], None], Made]:
    """What has a device do once more all that `work` gives it, and what it fills by that.

    The device does nothing of it in this call. The numbers are those that the same tensors have at each replay.
    """
    graph = torch.accelerator.Graph()
    with torch.Stream(device), graph:
        made = work()
    return graph.replay, made


def check_graphs(device: torch.device) -> None:
    """Raises ConfigError unless operations can be recorded on a device."""
    try:
        trial = torch.zeros(1, device=device)
        replay, _ = record(lambda: trial.add_(1), device)
        replay()
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        why = f"PyTorch {torch.__version__} records nothing for device '{device}'"
        raise ConfigError(f"graphs: {why}; leave --graphs out") from error


def copied_alongside(device: torch.device) -> Callable[[Batch], Batch]:
    """What puts a batch's tensors where a device copies them from while the program goes on; on a host it does nothing.

    Copies with non_blocking=True wait for the device otherwise.
    """
    if device.type in ("cpu", "mps"):  # one memory for both
        return lambda batch: batch
    try:
        torch.empty(1).pin_memory()
    except (RuntimeError, NotImplementedError):
        return lambda batch: batch
    return lambda batch: tree_map_only(Tensor, _pinned, batch)


def _pinned(tensor: Tensor) -> Any:
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on its device, with the formulation of its operations that suits it."""
    halves = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters())
    folded = device.type == "cpu" and not halves  # whose sums over frames would be rounded frame by frame
    for module in model.modules():
        if hasattr(module, "fold_time"):
            module.fold_time = folded
    if device.type == "cpu":
        use_onednn(model)
        use_host_attention(model)
        use_host_modulation(model)
        use_winograd(model)
    model = model.to(device)
    arranged = channels_last(model, folded=folded)
    if device.type == "cpu":
        leave_file(model, arranged + outputs_last(model))
    fuse_upsampling(model)
    fuse_residuals(model)
    return model


def keep_allocations_in_heap() -> None:
    """Makes glibc reuse large buffers instead of returning them to the system after each operation.

    Fresh pages cost more than the arithmetic on them: point-wise operations run about 1.5 times faster on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):  # elsewhere there is no glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: take no buffer from mmap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give none back
