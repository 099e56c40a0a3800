"""Counts the floating-point operations, memory traffic and peak memory of code that runs on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from opensora.acceleration.device import is_cpu
from opensora.acceleration.replace_modules import ModuleWrapper, replace_modules

PRODUCTS, CONVOLUTIONS, BANDWIDTH = 1e11, 5e10, 5e9  # operations and bytes a second at the nominal speed


class Cost(NamedTuple):
    """What a piece of work costs on a device."""

    products: float = 0  # floating-point operations of matrix products
    convolutions: float = 0  # floating-point operations of convolutions
    moved: float = 0  # bytes read and written
    calls: int = 0  # operations launched
    peak: int = 0  # bytes allocated at once, without weights

    def times(self, count: float) -> Cost:
        """The cost of the same work `count` times in sequence."""
        return Cost(*(value * count for value in self[:3]), int(self.calls * count), self.peak)

    def then(self, other: Cost) -> Cost:
        """The cost of this work and then the other."""
        sums = (mine + others for mine, others in zip(self[:4], other[:4], strict=True))
        return Cost(*sums, max(self.peak, other.peak))

    @property
    def nominal_seconds(self) -> float:
        """Seconds at the nominal speed."""
        return self.products / PRODUCTS + self.convolutions / CONVOLUTIONS + self.moved / BANDWIDTH


def count_operations(function: Callable[[], Any], device: torch.device) -> Cost:
    """The cost on `device` of a function that works on meta tensors."""
    counter = OperationCounter(device)
    counter.run(function)
    return counter.cost


class OperationCounter(TorchDispatchMode):
    """Adds up the operations that run under it on the meta device, as `device` would execute them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.on_cpu = is_cpu(device)
        self.products = self.convolutions = self.moved = 0.0
        self.calls = self.alive = self.peak = 0
        self.storages: dict[int, Any] = {}

    @property
    def cost(self) -> Cost:
        """What was counted so far."""
        return Cost(self.products, self.convolutions, self.moved, self.calls, self.peak)

    def run(self, function: Callable[[], Any]) -> None:
        """Calls a function and counts what it does."""
        with torch.no_grad(), self, _FusedAttention(self):
            function()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        known = {one.untyped_storage()._cdata for one in inputs}
        outputs = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        allocated = [one for one in outputs if one.untyped_storage()._cdata not in known]
        for tensor in allocated:
            self._allocate(tensor)
        if allocated or func._schema.is_mutable:
            self.calls += 1
            self.moved += sum(map(num_bytes, [*inputs, *outputs]))
        self._count(func, args, kwargs or {}, out, inputs)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor]) -> None:
        packet = func._overloadpacket
        if packet not in flop_registry:
            return
        flops = flop_registry[packet](*args, **kwargs, out_val=out)
        if packet is not torch.ops.aten.convolution:
            self.products += flops
            return
        self.convolutions += flops
        if self.on_cpu:  # its kernels copy input and output into another layout
            self.peak = max(self.peak, self.alive + num_bytes(inputs[0]) + num_bytes(out))

    def _allocate(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, partial(self._free, key, size))
            self.alive += size
            self.peak = max(self.peak, self.alive)

    def _free(self, key: int, size: int, _: Any) -> None:
        if self.storages.pop(key, None) is not None:
            self.alive -= size


class _FusedAttention(TorchFunctionMode):
    """Attention without its matrix of weights, as the fused kernels of all devices compute it."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        batch, heads, length, width = query.shape
        self.counter.products += 2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1])
        return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


class _CountedOnce(ModuleWrapper):
    """Runs `wrapped` once for inputs of the same shapes; later calls add the cost of that run."""

    def __init__(self, module: nn.Module, counter: OperationCounter) -> None:
        super().__init__(module)
        self.counter = counter
        self.known: dict[tuple[Any, ...], tuple[Cost, tuple[Any, ...]]] = {}  # signature -> cost, output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        counter, inputs = self.counter, tree_leaves((args, kwargs))
        key = (*kwargs, *(_shape(one) if isinstance(one, Tensor) else repr(one) for one in inputs))
        before, alive = counter.cost, counter.alive
        if key in self.known:
            spent, (size, stride, dtype) = self.known[key]
            out = torch.empty_strided(size, stride, dtype=dtype, device="meta")
            counter.products, counter.convolutions, counter.moved, counter.calls = (
                was + more for was, more in zip(before[:4], spent[:4], strict=True)
            )
            counter.peak = max(alive + spent.peak, before.peak)
            return out
        counter.peak = alive
        out = self.wrapped(*args, **kwargs)
        after = counter.cost
        counter.peak = max(after.peak, before.peak)
        held = {one.untyped_storage()._cdata for one in inputs if isinstance(one, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage()._cdata not in held:
            spent = (now - was for now, was in zip(after[:4], before[:4], strict=True))
            self.known[key] = Cost(*spent, after.peak - alive), _shape(out)
        return out


def count_repeats_once(model: nn.Module, counter: OperationCounter) -> nn.Module:
    """Wraps the parts of a meta model, so that `counter` traces each once for inputs of the same shapes."""
    containers = nn.ModuleList | nn.ModuleDict | nn.Sequential

    def wrapped(module: nn.Module) -> nn.Module:
        has_parts = any(module.children()) and not isinstance(module, containers)
        return _CountedOnce(module, counter) if has_parts else module

    return replace_modules(model, wrapped)


def num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def _shape(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype
