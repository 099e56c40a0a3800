"""Halves of guidance on two groups of ranks: the latents of one rank, from every sampler and under every cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.acceleration.step_cache import cached_sampling
from opensora.acceleration.step_cache.cached_sampling import Cache
from opensora.acceleration.step_cache.table import CacheTable
from opensora.distributed import sequence_parallel
from opensora.distributed.guidance_parallel import check_guidance_ranks, guidance_parallel
from opensora.distributed.process_group import RankLayout, start
from opensora.errors import ConfigError
from opensora.schedulers.iddpm import IDDPM
from opensora.schedulers.rf import RFLOW
from tests.full import count
from tests.ranks import run
from tests.test_sequence import KINDS, make

CPU = torch.device("cpu")
STEPS, TOLERANCE = 4, 1e-5
SIZES = {"25 patches": (5, 10, 10), "21 patches": (3, 6, 14)}
TABLE = CacheTable("2110", ((0.0, 0.0),) * 3 + ((1.5, -0.5),), ((0.0, 0.0),) + ((1.0, 0.0),) * 3)
CACHES = {"no cache": Cache(), "table": Cache("table", TABLE), "interval": Cache(interval=(0.0, 0.5))}


def sample(
    how: str | None, kind: str = "STDiT3", size: tuple[int, int, int] = SIZES["25 patches"], scale: float = 4.0,
    given: bool = False, cache: Cache | None = None, sequential_cfg: bool = False,
) -> Tensor:  # fmt: skip
    """Latents [1, C, T, H, W] on all ranks that there are; `how` None: without them."""
    model = make(kind).float().eval()
    if how is not None:
        layout = start(CPU, torch.distributed.get_world_size())
        model = guidance_parallel(model, layout, how)
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 4, *KINDS[kind].get("input_size", size), generator=draw)
    cond: dict[str, Any] = {"y": torch.randn(1, 1, 6, 16, generator=draw)}
    told = dict(fps=24.0, height=48.0, width=80.0, num_frames=9.0, ar=0.6)
    cond |= {name: torch.full((1,), value) for name, value in told.items()}
    cond |= {"hw": torch.tensor([[48.0, 80.0]])}
    if kind in ("DiT", "Latte"):
        cond["y"] = torch.tensor([3])
    scheduler: Any = RFLOW(num_sampling_steps=STEPS, cfg_scale=scale)
    if kind in ("DiT", "Latte"):
        scheduler = IDDPM(num_sampling_steps=STEPS, cfg_scale=scale, cfg_channel=3)
    edit = torch.tensor([[0.0, 0.6] + [1.0] * (noise.shape[2] - 2)]) if given else None
    options = {"edit": edit, "source": [torch.Generator().manual_seed(5)], "precompute": True}
    options["sequential_cfg"] = sequential_cfg and how != "apart"
    with torch.no_grad():
        null = None if scale == 1 else {"y": model.null_caption(cond["y"])}
        return cached_sampling.sample(scheduler, model, noise, cond, null, cache or Cache(), **options)


CASES: dict[str, dict[str, Any]] = {
    **{f"{kind}": {"kind": kind} for kind in ("STDiT3", "STDiT2", "DiT", "PixArt-Sigma")},
    **{f"{kind}, given frames": {"kind": kind, "given": True} for kind in ("STDiT3", "STDiT2", "STDiT")},
    "other size": {"size": SIZES["21 patches"], "given": True},
    "no guidance": {"scale": 1.0},
    "one after the other": {"sequential_cfg": True},
    **{f"{name}": {"cache": cache} for name, cache in CACHES.items()},
    "tea": {"cache": Cache("tea", threshold=0.5), "given": True},
}


RANKS = [(2, ("auto", "together")), (3, ("auto",)), (4, ("auto",))][: count(1, 3)]


def of_all_cases(hows: tuple[str, ...]) -> dict[str, Tensor]:
    return {f"{case}, {how}": sample(how, **options) for case, options in CASES.items() for how in hows}


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return {case: sample(None, **options) for case, options in CASES.items()}


@pytest.mark.parametrize(("ranks", "hows"), RANKS)
def test_latents_are_those_of_one_rank(alone, ranks, hows):
    for found in run(ranks, of_all_cases, hows):
        assert len(found) == len(CASES) * len(hows)
        for name, latents in found.items():
            expected = alone[name.rpartition(", ")[0]]
            error = (latents - expected).norm() / expected.norm()
            assert error < TOLERANCE, f"{name} on {ranks} ranks is off by {error:.1e}"


@contextmanager
def counted() -> Iterator[dict[str, list[int]]]:
    """The rows of each pass through the first block, and how many ranks each exchange has."""
    found: dict[str, list[int]] = {"rows": [], "exchanges": []}
    enter, exchange = sequence_parallel.SequenceSplit.scatter, sequence_parallel.AllToAll.forward

    def entered(self: Any, module: nn.Module, args: tuple[Any, ...]) -> Any:
        found["rows"].append(len(args[0]))
        return enter(self, module, args)

    def exchanged(ctx: Any, x: Tensor, group: Any) -> Tensor:
        found["exchanges"].append(len(x))
        return exchange(ctx, x, group)

    sequence_parallel.SequenceSplit.scatter, sequence_parallel.AllToAll.forward = entered, staticmethod(exchanged)
    try:
        yield found
    finally:
        sequence_parallel.SequenceSplit.scatter, sequence_parallel.AllToAll.forward = enter, exchange


def what_is_computed() -> dict[str, Any]:
    found = {}
    for name, how, options in (
        ("apart", "auto", {}), ("together", "together", {}), ("one after the other", "auto", {"sequential_cfg": True}),
        ("forced", "apart", {"sequential_cfg": True}), ("table", "auto", {"cache": CACHES["table"]}),
        ("no guidance", "apart", {"scale": 1.0}),
    ):  # fmt: skip
        with counted() as numbers:
            sample(how, **options)
        found[name] = numbers["rows"], sorted(set(numbers["exchanges"]))
    return found


@pytest.mark.parametrize("ranks", [4, 2][: count(1, 2)])
def test_each_group_computes_one_half(ranks):
    narrow = [] if ranks == 2 else [ranks // 2]
    for found in run(ranks, what_is_computed):
        assert found["apart"] == found["forced"] == ([1] * STEPS, narrow)
        assert found["together"] == ([2] * STEPS, [ranks])
        assert found["one after the other"] == ([1] * 2 * STEPS, [ranks])
        assert found["table"] == ([1] * 3, [*narrow, ranks]), "a half alone is for all ranks"
        assert found["no guidance"] == ([1] * STEPS, [ranks])


def test_ranks_that_make_no_two_groups():
    with pytest.raises(ConfigError, match="guidance_ranks 'apart' needs an even number of ranks, not 3; use auto"):
        check_guidance_ranks("apart", RankLayout(0, 3, 3))
    with pytest.raises(ConfigError, match="not 1; use auto or together"):
        check_guidance_ranks("apart", RankLayout())
    for how in ("auto", "together"):
        check_guidance_ranks(how, RankLayout(0, 3, 3))
    check_guidance_ranks("apart", RankLayout(0, 4, 4))


def test_a_rank_alone_keeps_its_model():
    model = make("STDiT3")
    assert guidance_parallel(model, RankLayout()) is model
