"""What the stages of a generation cost: counted without numbers on the meta device, set to the pace of this machine.

Weights are exact. Operations run on shapes alone; what they allocate, move and compute is added up, with the copies
that convolutions make on a host processor. How long a unit of work takes is what earlier runs here took for it, or
what a moment's trial takes.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from opensora.acceleration.device import synchronize
from opensora.acceleration.model_parts import kept_in_float32
from opensora.config.schema import Name, Number, Schema, check
from opensora.errors import MediaError
from opensora.files import read_json, replacing
from opensora.profiling.memory_meter import free_on_host
from opensora.profiling.peak_flops import known_peak

PRODUCTS, CONVOLUTIONS, BANDWIDTH = 1e11, 5e10, 5e9  # operations and bytes a second at the nominal pace
DISPATCH = 1e-5  # seconds that an operation takes however small it is
RUNS_KEPT, LONG_ENOUGH = 8, 10.0  # last runs of a device; seconds below which a run says nothing about the pace
ENOUGH_WORK = 0.1  # seconds at the nominal pace below which a run says nothing either: it was something else that took
BUSY, UNSURE = 20, 4  # times a trial's pace: what no stage needs that has a machine to itself; what one may need


class Cost(NamedTuple):
    """Floating-point operations of matrix products and of convolutions, bytes moved, operations, bytes at the peak."""

    products: float = 0
    convolutions: float = 0
    moved: float = 0
    calls: int = 0
    peak: int = 0  # without weights

    def times(self, count: float) -> Cost:
        """The cost of doing the same `count` times, one after the other."""
        return Cost(*(value * count for value in self[:3]), int(self.calls * count), self.peak)

    def then(self, other: Cost) -> Cost:
        """The cost of both, one after the other."""
        sums = (mine + others for mine, others in zip(self[:4], other[:4], strict=True))
        return Cost(*sums, max(self.peak, other.peak))

    @property
    def nominal_seconds(self) -> float:
        """Seconds at the nominal pace."""
        return self.products / PRODUCTS + self.convolutions / CONVOLUTIONS + self.moved / BANDWIDTH


class _Counter(TorchDispatchMode):
    """Adds up what runs under it on the meta device."""

    def __init__(self, on_host: bool) -> None:
        super().__init__()
        self.on_host = on_host
        self.products = self.convolutions = self.moved = 0.0
        self.calls = self.alive = self.peak = 0
        self.storages: dict[int, Any] = {}
        self.known: dict[tuple, tuple] = {}  # a module and the shapes it is given -> what it costs, and what it gives

    def call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `forward` of a module gives; of the second time with inputs of these shapes on, without running it."""
        inputs = tree_leaves((args, kwargs))
        key = (id(module), *kwargs, *(_shape(one) if isinstance(one, Tensor) else repr(one) for one in inputs))
        before, highest = (self.products, self.convolutions, self.moved, self.calls, self.alive), self.peak
        if key in self.known:
            spent, (size, stride, dtype) = self.known[key]
            out = torch.empty_strided(size, stride, dtype=dtype, device="meta")
            self.products, self.convolutions, self.moved, self.calls, self.peak = (
                was + more for was, more in zip(before, spent, strict=True)
            )
            self.peak = max(self.peak, highest)
            return out
        self.peak = self.alive
        out = forward(*args, **kwargs)
        after = (self.products, self.convolutions, self.moved, self.calls, self.peak)
        self.peak = max(self.peak, highest)
        held = {one.untyped_storage()._cdata for one in inputs if isinstance(one, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage()._cdata not in held:
            self.known[key] = (tuple(now - was for now, was in zip(after, before, strict=True)), _shape(out))
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        known = {one.untyped_storage()._cdata for one in inputs}
        made = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        fresh = [one for one in made if one.untyped_storage()._cdata not in known]
        for tensor in fresh:
            self._add(tensor)
        if fresh or func._schema.is_mutable:
            self.calls += 1
            self.moved += sum(map(_bytes, [*inputs, *made]))
        self._count(func, args, kwargs or {}, out, inputs)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor]) -> None:
        packet = func._overloadpacket
        if packet not in flop_registry:
            return
        count = flop_registry[packet](*args, **kwargs, out_val=out)
        if packet is not torch.ops.aten.convolution:
            self.products += count
            return
        self.convolutions += count
        if self.on_host:  # its kernels want another layout: both sides are copied
            self.peak = max(self.peak, self.alive + _bytes(inputs[0]) + _bytes(out))

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, partial(self._gone, key, size))
            self.alive += size
            self.peak = max(self.peak, self.alive)

    def _gone(self, key: int, size: int, _: Any) -> None:
        if self.storages.pop(key, None) is not None:
            self.alive -= size


class _FusedAttention(TorchFunctionMode):
    """Attention without its matrix of weights, as the kernels of all devices compute it."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        batch, heads, length, width = query.shape
        self.counter.products += 2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1])
        return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


def count(function: Callable[[], Any], device: torch.device, model: nn.Module | None = None) -> Cost:
    """The cost of calling a function that works on meta tensors, on `device`.

    What parts of `model` do again on inputs of the same shapes is added up, not run.
    """
    counter = _Counter(is_host(device))
    parts = [part for part in model.modules() if any(part.children())] if model is not None else []
    before = [part.__dict__.get("forward") for part in parts]
    for part in parts:
        part.forward = partial(counter.call, part, part.forward)
    try:
        with torch.no_grad(), counter, _FusedAttention(counter):
            function()
    finally:
        for part, forward in zip(parts, before, strict=True):
            del part.forward
            if forward is not None:
                part.forward = forward
    return Cost(counter.products, counter.convolutions, counter.moved, counter.calls, counter.peak)


def is_host(device: torch.device) -> bool:
    """Whether a device computes in the memory of this process."""
    return device.type == torch.empty(0).device.type


def shadow(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters and buffers of a model without numbers, as inference in `dtype` holds them."""

    def of(name: str, tensor: Tensor) -> Tensor:
        wanted = dtype if tensor.is_floating_point() and not kept_in_float32(name) else tensor.dtype
        return torch.empty(tensor.shape, dtype=wanted, device="meta")

    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: of(name, tensor) for name, tensor in tensors}


def weights(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the parameters and buffers of a model in inference."""
    return sum(map(_bytes, shadow(model, dtype).values()))


class _Method(nn.Module):
    """A method of a model as a module, so that it can run on other tensors."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = getattr(self.model, self.name)(*args, **kwargs)
        return deque(out, maxlen=1) if isinstance(out, Iterator) else out  # of pieces, one is held at a time


Work = Callable[[], Any]  # on meta tensors


def _work(model: nn.Module, dtype: torch.dtype, device: torch.device, method: str, *args: Any, **kwargs: Any) -> Work:
    for module in model.modules():
        if hasattr(module, "fold_time"):
            module.fold_time = is_host(device)
    tensors = {f"model.{name}": tensor for name, tensor in shadow(model, dtype).items()}
    return lambda: functional_call(_Method(model, method), tensors, args, kwargs, tie_weights=False)


def step(
    model: nn.Module, latent: tuple[int, ...], told: Mapping[str, Tensor], tokens: int, dtype: torch.dtype,
    device: torch.device, batch: int = 2, frames_given: bool = False,
) -> Work:  # fmt: skip
    """One evaluation of a diffusion model on latents (T, H, W), with and without text. It raises what the model does.

    `told` is its size conditioning, `tokens` the length of the text; `frames_given`: some frames are kept or edited.
    """
    config = model.config
    told = {name: value.to("meta") for name, value in told.items()}
    if str(config.get("condition", "text")).startswith("label"):
        y = torch.empty(batch, dtype=torch.int64, device="meta")
    else:
        y = torch.empty(batch, 1, tokens, config["caption_channels"], dtype=dtype, device="meta")
    if frames_given:
        told["x_mask"] = torch.empty(batch, latent[0], dtype=torch.bool, device="meta")
    x = torch.empty(batch, model.in_channels, *latent, device="meta")
    return _work(model, dtype, device, "forward", x, torch.empty(batch, device="meta"), y, **told)


def decoding(
    vae: nn.Module, size: tuple[int, ...], dtype: torch.dtype, device: torch.device, streamed: bool = False
) -> Cost:
    """Making one clip (T, H, W) of its latents; `streamed`: in pieces, of which one is held at a time."""
    z = torch.empty(1, vae.out_channels, *vae.get_latent_size(size), dtype=dtype, device="meta")
    return count(_work(vae, dtype, device, "decoded" if streamed else "decode", z, num_frames=size[0]), device, vae)


def encoding(
    vae: nn.Module, size: tuple[int, ...], dtype: torch.dtype, device: torch.device, at_once: int | None = None
) -> Cost:
    """Making the latents of a video (T, H, W), of which so many frames come at once (None: all)."""
    if at_once is None:
        x = torch.empty(1, 3, *size, dtype=dtype, device="meta")
        return count(_work(vae, dtype, device, "encode", x, sample=False), device, vae)
    pieces = torch.empty(1, 3, *size, dtype=dtype, device="meta").split(at_once, dim=2)
    return count(_work(vae, dtype, device, "encoded", pieces), device, vae)


def reading_text(config: Any, parameters: int, tokens: int) -> Cost:
    """Encoding one text with a T5 or CLIP of this transformers configuration, in float32."""
    width = getattr(config, "d_model", None) or config.hidden_size
    inner = getattr(config, "d_ff", None) or config.intermediate_size
    heads = getattr(config, "num_heads", None) or config.num_attention_heads
    peak = 4 * tokens * (3 * inner + 6 * width + 3 * heads * tokens)
    blocks = parameters - width * config.vocab_size
    return Cost(products=2.0 * tokens * blocks, moved=4.0 * blocks, calls=500, peak=peak)


class Span(NamedTuple):
    """Seconds that work takes, at best and at worst, and what they are known from."""

    least: float
    most: float
    source: str


class _Run(Schema):
    """An earlier run in the record: how long a stage took, as seconds for each second at the nominal pace."""

    device: Name
    stage: Name
    pace: Annotated[Number, Field(gt=0)]
    seconds: Annotated[Number, Field(ge=LONG_ENOUGH)]


def seconds(cost: Cost, device: torch.device, stage: str, dtype: torch.dtype = torch.float32) -> float:
    """Seconds that a stage of this cost takes at best on this device, which computes in this type."""
    return span(cost, device, stage, dtype).least


def span(cost: Cost, device: torch.device, stage: str, dtype: torch.dtype = torch.float32) -> Span:
    """From the fastest to the middle one of the last runs here, or from a moment's trial.

    Runs far slower than the trial were those of a busy machine and are left out. Nothing is faster than the peak.
    """
    trial, name = _trial(device, dtype), name_of(device, dtype)
    known = [run.pace for run in _runs() if (run.device, run.stage) == (name, stage)]
    paces = [pace for pace in known[-RUNS_KEPT:] if pace <= BUSY * trial]
    source = f"{len(paces)} earlier run{'s' * (len(paces) > 1)} here" if paces else "a moment's trial"
    fast, slow = (min(paces), statistics.median(paces)) if paces else (trial, UNSURE * trial)
    dispatch, peak = DISPATCH * cost.calls, known_peak(device, dtype)
    floor = (cost.products + cost.convolutions) / peak if peak else 0.0
    least, most = (max(cost.nominal_seconds * pace, floor) + dispatch for pace in (fast, slow))
    return Span(least, most, source)


def remember(device: torch.device, stage: str, cost: Cost, taken: float, dtype: torch.dtype = torch.float32) -> None:
    """Notes how long a stage took on this device, if it was long enough to say something about its pace."""
    dispatch = DISPATCH * cost.calls
    if taken < LONG_ENOUGH or cost.nominal_seconds < ENOUGH_WORK or dispatch > taken / 2:
        return
    pace = (taken - dispatch) / cost.nominal_seconds
    run = _Run(device=name_of(device, dtype), stage=stage, pace=pace, seconds=taken)
    same = [one for one in _runs() if (one.device, one.stage) == (run.device, run.stage)][1 - RUNS_KEPT :]
    others = [one for one in _runs() if (one.device, one.stage) != (run.device, run.stage)]
    text = json.dumps([one.model_dump() for one in [*others, *same, run]])
    with suppress(MediaError), replacing(_file(), make_folders=True) as [temporary]:
        temporary.write_text(text, encoding="utf-8")


def _runs() -> list[_Run]:
    """The record of runs; none where it cannot be read. Those of older versions say too little."""
    with suppress(MediaError):
        known = check(list[dict], read_json(_file()), error=MediaError)
        return check(list[_Run], [run for run in known if "seconds" in run], error=MediaError)
    return []


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "opensora", "paces.json").expanduser()


def wait(device: torch.device) -> None:
    """Returns when a device has done all that it was given."""
    synchronize(device)


def name_of(device: torch.device, dtype: torch.dtype) -> str:
    """What a device is called in the record of runs: its kind; of a host, too, how many threads compute, and in what.

    An accelerator computes in half precision, unless it was asked for more; a host in float32.
    """
    if not is_host(device):
        return device.type
    name = f"{device.type}-{torch.get_num_threads()}"
    return name if dtype == torch.float32 else f"{name}-{str(dtype).removeprefix('torch.')}"


@cache
def _trial(device: torch.device, dtype: torch.dtype) -> float:
    """How much slower than the nominal pace this device is in a type: matrix products and sums of some milliseconds."""
    one = torch.ones(1024, 1024, device=device, dtype=dtype)
    large = torch.ones(8, 1024, 1024, device=device, dtype=dtype)
    work, found = Cost(products=4 * 2.0 * 1024**3, moved=4 * 3.0 * _bytes(large)), []
    for _attempt in range(3):  # the first one pays for the start of threads and kernels
        begin = time.perf_counter()
        for _ in range(4):
            one @ one
            large + large
        wait(device)
        found.append(time.perf_counter() - begin)
    return min(found) / work.nominal_seconds


def available(device: torch.device) -> int | None:
    """Bytes that a device has to give, None where nobody says."""
    if not is_host(device):
        ask = getattr(torch.accelerator, "get_memory_info", None)
        return ask(device)[0] if ask else None
    with suppress(OSError, KeyError):
        return free_on_host()
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def resident() -> int:
    """Bytes that this process occupies now; a guess where the system does not say."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return 600 * 2**20


def _shape(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
