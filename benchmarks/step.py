"""A training step of one pair of blocks of STDiT3-XL/2: forward and backward, plain against the fast path.

python -m benchmarks.step [--sizes 144p-2s] [--tokens 120] [--compile 1] [--repeats 3] [--threads N]
    [--output results]

A batch of two clips with gradients of all weights; in training the fast path reads the text in each block, too. With
`--compile 1` the fast path takes part a second time with its blocks compiled.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import common, pair, plain
from opensora.acceleration.device import place, training_context
from opensora.acceleration.parallelize import compile_blocks
from opensora.models.stdit.stdit3 import STDiT3

PASSES = 3  # products of a step for each of its forward pass: its own, and two gradients


def step(model: torch.nn.Module, out: torch.Tensor) -> None:
    """Gradients of a loss of `out`; those of the step before are forgotten."""
    model.zero_grad(set_to_none=True)
    out.square().mean().backward()


def gradient_error(fast: torch.nn.Module, slow: torch.nn.Module) -> float:
    """The largest relative error of the gradients of a weight matrix."""
    expected = dict(slow.named_parameters())
    return max(
        common.relative_error(p.grad, expected[name].grad)
        for name, p in fast.named_parameters()
        if p.grad is not None and p.ndim > 1
    )


def measure(
    fast: STDiT3, slow: plain.PlainSTDiT3, size: tuple[int, int], tokens: int, repeats: int, compiled: STDiT3 | None
) -> dict[str, Any]:
    """Times, ratios, error of the gradients and the bound of one size."""
    x, y, timestep = pair.inputs(fast, size, tokens).values()
    context = training_context(torch.device("cpu"), "fp32")
    with context:
        texts = [y] * len(fast.text_blocks())
        sides = {
            "plain": common.as_usual(lambda: step(slow, pair.plain_step(slow, x, y, timestep))),
            "plain, memory kept": lambda: step(slow, pair.plain_step(slow, x, y, timestep)),
            "fast": lambda: step(fast, pair.fast_step(fast, x, texts, timestep)),
        }
        if compiled is not None:
            sides["fast, compiled"] = lambda: step(compiled, pair.fast_step(compiled, x, texts, timestep))
        times = common.race(sides, repeats)
        error = gradient_error(fast, slow)
        flops = common.linear_flops(fast, sides["fast"])
        compared = {name: sides[name] for name in ("plain", "fast")}
        limit = common.bound(flops, common.peak_flops(), times, PASSES, **compared)
    return {"times": times, "faster": common.ratios(times), "relative_error": error, "products": limit}


def main() -> None:
    given = common.arguments(__doc__, repeats=3, sizes=["144p-2s"], tokens=120, hidden=1152, heads=16, compile=0)
    compiled = place(pair.build(given.hidden, given.heads)[0].train(), torch.device("cpu")) if given.compile else None
    if compiled is not None:
        compile_blocks(compiled)
    fast, slow = pair.build(given.hidden, given.heads)
    place(fast.train(), torch.device("cpu"))
    found = {
        name: measure(fast, slow.train(), size, given.tokens, given.repeats, compiled)
        for name, size in common.sizes_of(given.sizes, pair.SIZES).items()
    }
    summary = {name: common.summary(one) for name, one in found.items()}
    bars = {name: {side: t["seconds"] for side, t in one["times"].items()} for name, one in found.items()}
    common.save("step", {"tokens": given.tokens, "sizes": found, "summary": summary}, bars, given.output)


if __name__ == "__main__":
    main()
