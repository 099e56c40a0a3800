"""A training step of one pair of blocks of STDiT3-XL/2: forward and backward, plain against the fast path.

python -m benchmarks.step [--sizes 144p-2s] [--dtypes fp32] [--tokens 120] [--compile 1] [--repeats 3] [--threads N]
    [--output results]

A batch of two clips with gradients of all weights; in training the fast path reads the text in each block, too.
`bf16` is mixed precision, which the published configurations train in: on both sides products take bfloat16, and the
errors are those against the plain gradients in float32. With `--compile 1` the fast path takes part a second time with
its blocks compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, pair, plain
from opensora.acceleration.compile import compile_blocks
from opensora.acceleration.placement import to_device
from opensora.acceleration.precision import DTYPES, training_context
from opensora.models.stdit.stdit3 import STDiT3

CPU = torch.device("cpu")
PASSES = 3  # products of a step for each of its forward pass: its own, and two gradients


def step(model: nn.Module, forward: Callable[[], Tensor], dtype: str) -> None:
    """Gradients of a loss of what `forward` gives; those of the step before are forgotten."""
    with training_context(CPU, dtype):
        loss = forward().float().square().mean()
    model.zero_grad(set_to_none=True)
    loss.backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those of the weight matrices."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.ndim > 1}


def largest_error(model: nn.Module, expected: dict[str, Tensor]) -> float:
    """The largest relative error of a model's gradients."""
    return max(common.relative_error(grad, expected[name]) for name, grad in gradients(model).items())


def measure(
    fast: STDiT3, slow: plain.PlainSTDiT3, compiled: STDiT3 | None, size: tuple[int, int], dtype: str, given: Any
) -> dict[str, Any]:
    """Times, ratios, errors of the gradients and the bound of one size in one type."""
    x, y, timestep = pair.inputs(fast, size, given.tokens).values()
    texts = [y] * len(fast.blocks_in_order())

    def plainly(dtype: str = dtype) -> None:
        step(slow, lambda: pair.plain_step(slow, x, y, timestep), dtype)

    def our_way(model: STDiT3) -> Callable[[], None]:
        return lambda: step(model, lambda: pair.fast_step(model, x, texts, timestep), dtype)

    sides = {"plain": plainly, "fast": our_way(fast)}
    if compiled is not None:
        sides["fast, compiled"] = our_way(compiled)
    plainly("fp32")
    expected, errors = gradients(slow), {}
    for name, model in (("plain", slow), ("fast", fast)):
        sides[name]()
        errors[name] = largest_error(model, expected)
    times = common.race(sides, given.repeats)
    flops, peak = common.linear_flops(fast, sides["fast"]), common.peak_flops(dtype=DTYPES[dtype])
    limit = common.bound(flops, peak, times, PASSES, **{name: sides[name] for name in ("plain", "fast")})
    return {"times": times, "faster": common.ratios(times), "relative_error": errors, "products": limit}


def main() -> None:
    given = common.arguments(
        __doc__, repeats=3, sizes=["144p-2s"], dtypes=["fp32"], tokens=120, hidden=1152, heads=16, compile=0
    )
    common.sizes_of(given.dtypes, DTYPES)
    compiled = to_device(pair.build(given.hidden, given.heads)[0].train(), CPU) if given.compile else None
    if compiled is not None:
        compile_blocks(compiled)
    fast, slow = pair.build(given.hidden, given.heads)
    to_device(fast.train(), CPU)
    found = {
        f"{name} {dtype}": measure(fast, slow.train(), compiled, size, dtype, given)
        for name, size in common.sizes_of(given.sizes, pair.SIZES).items()
        for dtype in given.dtypes
    }
    summary = {name: common.summary(one) for name, one in found.items()}
    bars = {name: {side: t["seconds"] for side, t in one["times"].items()} for name, one in found.items()}
    common.save("step", {"tokens": given.tokens, "sizes": found, "summary": summary}, bars, given.output)


if __name__ == "__main__":
    main()
