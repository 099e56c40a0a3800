"""Counts the floating-point operations, memory traffic and peak memory of code that runs on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from opensora.acceleration.chunked_forward import chunk_length, chunked
from opensora.acceleration.device import is_cpu
from opensora.acceleration.replace_modules import ModuleWrapper, replace_modules
from opensora.models.layers.pieces import concatenated, one_by_one
from opensora.profiling.meta_shapes import MetaShapes, run_on_meta, tensors_in

PRODUCTS, CONVOLUTIONS, BANDWIDTH = 1e11, 5e10, 5e9  # operations and bytes a second at the nominal speed
CONTAINERS = nn.ModuleList | nn.ModuleDict | nn.Sequential
MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


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


class OperationCounter(MetaShapes):
    """Adds up the operations that run under it on the meta device, as `device` would execute them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.on_cpu = is_cpu(device)
        self.cost = Cost()
        self.alive = 0  # bytes allocated now
        self.storages: dict[int, Any] = {}

    def run(self, function: Callable[[], Any]) -> Cost:
        """The cost of calling a function."""
        self.cost = Cost()
        with torch.no_grad(), self, _WholeFunctions(self):
            function()
        return self.cost

    def repeat(self, count: int, function: Callable[[], Tensor]) -> Tensor:
        """The result of a single call of a function, at the cost of `count` calls."""
        before, self.cost = self.cost, Cost()
        result = function()
        self.cost = before.then(self.cost.times(count))
        return result

    def add(self, work: Cost) -> None:
        """Adds work, whose peak includes what is allocated already."""
        self.cost = self.cost.then(work)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in(args, kwargs)
        out = run_on_meta(func, args, kwargs, inputs)
        outputs = tensors_in(out)
        known = {_storage(one) for one in inputs}
        allocated = [one for one in outputs if _storage(one) not in known]
        for tensor in allocated:
            self._allocate(tensor)
        if allocated or func._schema.is_mutable:
            moved = sum(map(num_bytes, [*inputs, *outputs]))
            self.add(Cost(moved=moved, calls=1, peak=self.alive))
        if flops := flop_registry.get(func._overloadpacket):
            self.add(self._arithmetic(flops(*args, **kwargs, out_val=out), func, inputs[0], out))
        return out

    def _arithmetic(self, flops: int, func: Any, x: Tensor, out: Tensor) -> Cost:
        if func._overloadpacket is not torch.ops.aten.convolution:
            return Cost(products=flops)
        layouts = num_bytes(x) + num_bytes(out) if self.on_cpu else 0  # a CPU copies them into another layout
        return Cost(convolutions=flops, peak=self.alive + layouts)

    def _allocate(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, partial(self._free, key, size))
            self.alive += size

    def _free(self, key: int, size: int, _: Any) -> None:
        if self.storages.pop(key, None) is not None:
            self.alive -= size


class _WholeFunctions(TorchFunctionMode):
    """Counts functions as a whole whose operations would tell too much, or take too long to trace."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()
        self.counter = counter
        self.functions: dict[Any, Callable[..., Any]] = {
            F.scaled_dot_product_attention: self._attention,
            chunked: self._chunked,
            concatenated: self._concatenated,
            one_by_one: self._one_by_one,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.functions.get(func, func)(*args, **(kwargs or {}))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Without its matrix of weights, as the fused kernels of all devices compute it."""
        batch, heads, length, width = query.shape
        self.counter.add(Cost(products=2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1])))
        return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)

    def _chunked(self, function: Callable[[Tensor], Tensor], x: Tensor, axis: int, tokens: int) -> Tensor:
        """One chunk of each length stands for all."""
        step, length = chunk_length(x, axis, tokens), x.shape[axis]
        with self:
            if step >= length:
                return function(x)
            out = torch.empty_like(x)
            for count, size in ((length // step, step), (1, length % step)):
                if size:
                    part, target = x.narrow(axis, 0, size), out.narrow(axis, 0, size)
                    self.counter.repeat(count, partial(_write, function, part, target))
        return out

    def _concatenated(self, function: Callable[[Tensor], Tensor], pieces: Iterable[Tensor], dim: int) -> Tensor:
        """Of consecutive pieces of one layout the last one, with the results of the others, stands for all."""
        counter, results = self.counter, []
        with self:
            for _, group in groupby(pieces, _layout):
                piece, *others = group
                if others:
                    before, size = counter.cost, list(function(piece).shape)
                    size[dim] *= len(others)
                    results.append(piece.new_empty(size))
                    counter.cost = before
                results.append(counter.repeat(1 + len(others), partial(function, piece)))
            return torch.cat(results, dim)

    def _one_by_one(self, function: Callable[[Tensor], Tensor], pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Of consecutive pieces of one layout the second one, beside the result of the first, stands for the others."""
        for _, group in groupby(pieces, _layout):
            piece, *others = group
            yield function(piece)
            if others:
                yield self.counter.repeat(len(others), partial(function, piece))


def _write(function: Callable[[Tensor], Tensor], x: Tensor, out: Tensor) -> Tensor:
    return out.copy_(function(x))


class CountedModel:
    """A model on the meta device whose calls are counted, as `device` would execute them.

    Parts that are built alike, and their `decode`, are traced once for inputs of the same shapes; later calls add the
    cost of the first. For that the parts of `model` are wrapped.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.counter = OperationCounter(device)
        self._memo = _Memo(self.counter)
        self._kinds: dict[Any, int] = {}
        self.model = replace_modules(model, self._counted_once)

    def count(self, call: Callable[[Any], Any]) -> Cost:
        """The cost of `call(model)` for inputs on the meta device."""
        return self.counter.run(lambda: call(self.model))

    def _counted_once(self, module: Any) -> nn.Module:
        if isinstance(module, CONTAINERS) or not any(module.children()):
            return module
        kind = self._kinds.setdefault(_structure(module), len(self._kinds))
        if hasattr(module, "decode"):  # autoencoders call it once for each piece of a video
            module.decode = partial(self._memo, (kind, "decode"), module.decode)
        return _CountedOnce(module, kind, self._memo)


class _Memo:
    """Traces functions once for inputs of the same shapes; later calls add the cost of the first.

    known: what was traced, by kind of function and shapes of the inputs
    """

    def __init__(self, counter: OperationCounter) -> None:
        self.counter = counter
        self.known: dict[Any, Any] = {}

    def __call__(self, kind: Hashable, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        counter, key = self.counter, (kind, _signature(args), _signature(kwargs))
        before, alive = counter.cost, counter.alive
        if key in self.known:
            work, (size, stride, dtype) = self.known[key]
            out = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        else:
            counter.cost = Cost()
            out = function(*args, **kwargs)
            work = counter.cost._replace(peak=counter.cost.peak - alive)
            if isinstance(out, Tensor) and _storage(out) not in map(_storage, tensors_in(args, kwargs)):
                self.known[key] = work, _layout(out)
        counter.cost = before.then(work._replace(peak=alive + work.peak))
        return out


class _CountedOnce(ModuleWrapper):
    """Runs `wrapped` through a memo. kind: a number for all modules that are built alike."""

    def __init__(self, module: nn.Module, kind: int, memo: _Memo) -> None:
        super().__init__(module)
        self.kind, self.memo = kind, memo

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.memo(self.kind, self.wrapped, *args, **kwargs)


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """What decides the operations of a module: the same for modules that are built alike."""
    if isinstance(module, _CountedOnce):
        return (module.kind,)
    tensors = (*module._parameters.items(), *module._buffers.items())
    return (
        type(module),
        *((name, repr(value)) for name, value in vars(module).items() if name not in MODULE_ATTRIBUTES),
        *((name, _layout(tensor)) for name, tensor in tensors if tensor is not None),
        *((name, _structure(child)) for name, child in module.named_children()),
    )


def num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def _signature(value: Any) -> Hashable:
    """An argument with the layouts of its tensors in place of them."""
    if isinstance(value, Tensor):
        return _layout(value)
    if isinstance(value, list | tuple):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((name, _signature(one)) for name, one in value.items())
    return repr(value)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
