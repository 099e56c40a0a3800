"""Compiled blocks: one graph each, whatever the size, and the same numbers."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora import registry
from opensora.acceleration.compile import compile_blocks
from opensora.acceleration.model_parts import blocks_of
from opensora.cli import main
from opensora.models.sizes import size_conditioning
from opensora.models.stdit.stdit3 import STDiT3
from tests.full import FULL
from tests.test_plain import error, randomize

CPU = torch.device("cpu")
SIZES = [(5, 8, 14), (7, 6, 22), (11, 12, 10), (3, 26, 4)]  # latent, of lengths that are no others by chance
SETTINGS = dict(hidden_size=32, depth=1, num_heads=2, caption_channels=16, model_max_length=8, qk_norm=True)
# Batches of one or more, clips of one latent frame or more, with and without given frames: all that sizes are not
# symbolic for. By default two of them, beyond a limit that is lower than PyTorch's own.
BUCKETS = list(itertools.product((1, 2), (1, 5), (False, True)))[:: 1 if FULL else 6]
LIMIT = 8 if FULL else 1
# Model -> kinds of blocks, each with a graph for every bucket that the model can tell apart.
KINDS = {"STDiT2": 1} | ({"STDiT3": 2, "STDiT": 1, "Latte": 2, "DiT": 1, "PixArt": 1, "PixArtMS": 1} if FULL else {})


@pytest.fixture
def model() -> Iterator[STDiT3]:
    torch.compiler.reset()
    made = STDiT3(**SETTINGS).eval()
    randomize(made)
    yield made
    torch.compiler.reset()


@torch.no_grad()
def step(model: nn.Module, size: tuple[int, int, int]) -> Tensor:
    frames, height, width = size
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 4, *size, generator=draw), torch.randn(2, 1, 8, 16, generator=draw)
    told = size_conditioning("STDiT2", 2, (8 * height, 8 * width), frames, 24, device=CPU)
    return model(x, torch.tensor([500.0, 300.0]), y, **told)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_training_on_buckets_never_falls_back(kind: str) -> None:
    """A graph for each bucket and kind of block, and none for another size of the same bucket."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    fixed = "input_size" in registry.keywords(kind) and kind not in ("STDiT2", "STDiT3")
    masks = "x_mask" in registry.builder(kind).forward.__annotations__
    found = {(batch, frames, given and masks) for batch, frames, given in BUCKETS}
    counter, models = CompileCounterWithBackend("eager"), {}
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=LIMIT):
        for batch, frames, given in sorted(found):
            for size in [(8, 8)] if fixed else [(8, 14), (6, 22)]:
                built_for = (frames, *size) if fixed else ()
                if built_for not in models:
                    models[built_for] = made = small(kind, built_for)
                    compile_blocks(made, counter)
                train(models[built_for], kind, batch * 2 - 1, (frames, *size), given)
    assert counter.frame_count == KINDS[kind] * len(found)


def small(kind: str, built_for: tuple[int, ...]) -> nn.Module:
    settings = {
        **SETTINGS,
        "depth": 2 if kind == "Latte" else 1,
        "hidden_size": 36,
        **({"input_size": built_for} if built_for else {}),
    }
    return registry.build({"type": kind, **{k: v for k, v in settings.items() if k in registry.keywords(kind)}})


def train(model: nn.Module, kind: str, batch: int, size: tuple[int, int, int], given: bool) -> None:
    """A forward and a backward pass; with `given`, the first frame is."""
    frames, height, width = size
    pixels = (8 * height, 8 * width)
    told = size_conditioning("PixArtMS" if kind == "PixArtMS" else "STDiT2", batch, pixels, frames, 24, device=CPU)
    if given:
        told["x_mask"] = torch.arange(frames).expand(batch, -1) > 0
    y = torch.zeros(batch, 1, 8 if "STDiT" in kind or "Pix" in kind else 1, 16)
    model(torch.zeros(batch, 4, *size), torch.full((batch,), 500.0), y, **told).sum().backward()


@pytest.mark.parametrize(("flags", "times"), [([], 0), (["--compile"], 1), (["--compile", "--memory", "low"], 0)])
def test_the_flag_compiles_the_model(
    flags: list[str], times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr("opensora.pipeline.loaded_models.compile_blocks", compiled.append)
    size = ["--num-frames", "1", "--image-size", "32", "32", "--num-sampling-steps", "1"]
    assert main(["generate", "a red circle", *size, "--save-dir", str(tmp_path), *flags]) == 0
    assert [type(model) for model in compiled] == [STDiT3] * times
    assert ("nothing is compiled" in caplog.text) == ("low" in flags)


@pytest.mark.timeout(1200)
def test_compiled_blocks_compute_the_same(model: STDiT3) -> None:
    """A block is one graph for every size. Without a C++ compiler the graphs run as they are."""
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return compile_fx(graph, inputs) if shutil.which("g++") else graph

    expected, numbers = [step(model, size) for size in SIZES], []
    compile_blocks(model, backend)
    counters.clear()
    for size, tensor in zip(SIZES, expected, strict=True):
        assert error(step(model, size), tensor) < 1e-5
        numbers.append(len(graphs))
    assert numbers[0] >= len(blocks_of(model)) and set(numbers) == {numbers[0]} and not counters["graph_break"]
