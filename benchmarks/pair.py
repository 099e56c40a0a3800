"""One spatial and one temporal block of STDiT3-XL/2: the plain formulation against the fast path, same weights.

python -m benchmarks.pair [--sizes 144p-2s] [--dtypes fp32] [--tokens 120] [--repeats 5] [--threads N]
    [--output results]

A step of one request: both halves of guidance, text of so many real tokens (packed, as published). As in a request, the
fast path has read the text before and is told one timestep for both halves. `int8` is the fast path with linear layers
in 8 bits; the error of `fp8`, which takes a GPU to be fast, is stated too. `share` is the part of each side's time that
its matrix products would take at the best pace that this machine shows for any product.

In `bf16` (`--cpu-dtype bf16` of a request) both sides compute in that type, without a side in 8 bits; the errors of
both are against the plain one in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import common, plain
from opensora.acceleration.placement import to_device
from opensora.acceleration.precision import DTYPES
from opensora.acceleration.quantization import KINDS, quantize
from opensora.models.layers.attention import rotation_table
from opensora.models.stdit.stdit3 import STDiT3

SIZES = {  # frames of latents, patches of a frame
    "tiny": (3, 12), "144p-image": (1, 144), "144p-2s": (15, 144), "240p-2s": (15, 405), "360p-2s": (15, 920),
    "480p-2s": (15, 1590), "720p-2s": (15, 3600),
}  # fmt: skip
HALVES = 2


def build(hidden_size: int = 1152, num_heads: int = 16) -> tuple[STDiT3, plain.PlainSTDiT3]:
    """The fast and the plain model of one pair of blocks, neither on a device yet."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=hidden_size, num_heads=num_heads, depth=1, caption_channels=8, model_max_length=300)
    fast = STDiT3(**sizes)
    for parameter in fast.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)  # what starts at zero has an effect here
    slow = plain.PlainSTDiT3(fast.config)
    slow.load_state_dict(fast.state_dict())
    return fast, slow


def inputs(fast: STDiT3, size: tuple[int, int], tokens: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Tokens, text and time embeddings of a step."""
    dim, (frames, patches) = fast.hidden_size, size
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(HALVES, frames, patches, dim, generator=generator).to(device, fast.dtype)
    y = torch.randn(HALVES, tokens, dim, generator=generator).to(device, fast.dtype)
    return {"x": x, "y": y, "timestep": torch.full((HALVES,), 500.0, device=device)}


def keys_values(fast: STDiT3, y: torch.Tensor) -> list[Any]:
    """The text's keys and values for each block, which a request computes once."""
    return [block.cross_attn.read(y) for block in fast.blocks_in_order()]


def fast_step(fast: STDiT3, x: torch.Tensor, texts: Sequence[Any], timestep: torch.Tensor) -> torch.Tensor:
    """The tokens after the pair; `texts` has the text of each block, or its keys and values."""
    modulation, rotation = fast.modulation(timestep, 0, None), rotation_table(fast.rope.freqs, x.shape[1])
    for block, text in zip(fast.blocks_in_order(), texts, strict=True):
        x = block(x, modulation.blocks, text, None, *((rotation,) if block.axis == "time" else ()))
    return x


def plain_step(slow: plain.PlainSTDiT3, x: torch.Tensor, y: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The same, of tokens [B, T * S, C], all of them under a mask of ones."""
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    t, t0 = (slow.t_block(slow.t_embedder(one)) for one in (timestep, torch.zeros_like(timestep)))
    out = slow.transform(x.flatten(1, 2), y.flatten(0, 1)[None], [y.shape[1]] * len(y), t, t0, mask)
    return out.view(x.shape)


def measure(
    fast: STDiT3, slow: plain.PlainSTDiT3, size: tuple[int, int], dtype: str, tokens: int, repeats: int
) -> dict[str, Any]:
    """Times, ratios, errors and the bound of one size in one type, of models in float32 and not placed."""
    x, y, timestep = inputs(fast, size, tokens).values()
    exact, kind = plain_step(slow, x, y, timestep), DTYPES[dtype]
    x, y, slow = x.to(kind), y.to(kind), common.cast(slow, kind)
    eight = KINDS if dtype == "fp32" else {}
    models = {"fast": common.cast(fast, kind), **{name: quantize(copy.deepcopy(fast), name) for name in eight}}
    works: dict[str, common.Work] = {}
    for name, model in models.items():
        to_device(model, torch.device("cpu"))
        works[name] = partial(fast_step, model, x, keys_values(model, y), timestep[:1])
    plainly = partial(plain_step, slow, x, y, timestep)
    sides = {"plain": plainly, "fast": works["fast"]}
    if "int8" in works:
        sides["int8"] = works["int8"]
    made = {"plain": plainly(), **{name: work() for name, work in works.items()}}
    errors = {name: common.relative_error(one, exact) for name, one in made.items()}
    for name in eight:
        errors[f"{name} of what the pair adds"] = common.relative_error(made[name] - x, exact - x)
    times = common.race(sides, repeats)
    flops, peak = common.linear_flops(models["fast"], works["fast"]), common.peak_flops(dtype=kind)
    limit = common.bound(flops, peak, times, plain=sides["plain"], fast=works["fast"])
    return {"times": times, "faster": common.ratios(times), "relative_error": errors, "products": limit}


@torch.no_grad()
def main() -> None:
    given = common.arguments(__doc__, sizes=["144p-2s"], dtypes=["fp32"], tokens=120, hidden=1152, heads=16)
    common.sizes_of(given.dtypes, DTYPES)
    fast, slow = build(given.hidden, given.heads)
    fast.requires_grad_(False)
    found = {
        f"{name} {dtype}": measure(fast, slow, size, dtype, given.tokens, given.repeats)
        for name, size in common.sizes_of(given.sizes, SIZES).items()
        for dtype in given.dtypes
    }
    summary = {name: common.summary(one) for name, one in found.items()}
    bars = {name: {side: t["seconds"] for side, t in one["times"].items()} for name, one in found.items()}
    common.save("pair", {"tokens": given.tokens, "sizes": found, "summary": summary}, bars, given.output)


if __name__ == "__main__":
    main()
