"""What a step costs is counted exactly; what a run gets done is reported in the right proportions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from opensora.acceleration.activation_checkpointing import checkpoint_blocks
from opensora.acceleration.precision import training_context
from opensora.distributed.process_group import RankLayout
from opensora.models.stdit.stdit3 import STDiT3
from opensora.profiling import peak_flops
from opensora.profiling.cost_model import CostModel
from opensora.training import throughput
from opensora.training.data.batch import clip_conditioning
from opensora.training.throughput import StepCost, Throughput
from tests.ranks import run
from tests.tiny import TINY_STDIT3

CPU = torch.device("cpu")
TEXT = 7


def batch(count: int, latent: tuple[int, int, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    frames, height, width = latent
    sizes = clip_conditioning("STDiT3", count, (17 * frames // 5 or 1, 8 * height, 8 * width), 24.0)
    return torch.randn(count, 4, *latent), {"y": torch.randn(count, 1, TEXT, 32), **sizes}


def forward_flops(frames: int, patches: int) -> int:
    """Of TINY_STDIT3 for one clip, by hand: 2 operations for each weight and token, 4 for each pair and channel."""
    width, depth, inputs, outputs = 32, 2, 4 * 4, 4 * 8
    tokens, blocks = frames * patches, 2 * depth
    linear = blocks * tokens * 2 * (4 + 2 + 8) * width**2  # qkv and proj, q and proj of the cross-attention, MLP
    pairs = patches + (frames if frames > 1 else 0)  # a frame alone has nothing to attend to in time,
    linear -= depth * tokens * 2 * 2 * width**2 * (frames == 1)  # so that of qkv only the values count
    attention = depth * tokens * 4 * width * pairs + blocks * tokens * 4 * TEXT * width
    text = blocks * TEXT * 2 * 2 * width**2 + TEXT * 2 * (width * width + width * width)
    ends = tokens * 2 * width * (inputs + outputs)
    times = 2 * 2 * (256 * width + width * width) + 2 * width * 6 * width  # of the timestep and the frame rate
    return linear + attention + text + ends + times


class TestStepCost:
    @pytest.mark.parametrize(("latent", "count"), [((5, 4, 6), 2), ((1, 8, 8), 3), ((10, 5, 3), 1)])
    def test_is_that_of_the_formula(self, latent, count):
        torch.manual_seed(0)
        cost = StepCost(STDiT3(**TINY_STDIT3), "STDiT3")
        frames, height, width = latent
        patches = -(-height // 2) * -(-width // 2)
        tokens, flops = cost(*batch(count, latent))
        assert tokens == count * frames * patches
        assert flops == pytest.approx(3 * count * forward_flops(frames, patches), rel=1e-9)

    def test_is_what_a_real_step_computes(self):
        torch.manual_seed(0)
        model = STDiT3(**TINY_STDIT3)
        latents, cond = batch(2, (5, 4, 4))
        math = sdpa_kernel(SDPBackend.MATH)  # the only attention of a CPU that the counter sees
        with math, training_context(CPU, "fp32"), FlopCounterMode(display=False) as counter:
            model(latents, torch.rand(2), **cond).sum().backward()
        unneeded = 20 * 2 * 32 * 16 + TEXT * 2 * 32 * 32 + 2 * 2 * 256 * 32  # gradients of patches, text and times
        assert StepCost(model, "STDiT3")(latents, cond)[1] == counter.get_total_flops() + 2 * unneeded

    def test_leaves_checkpointing_out(self):
        model = STDiT3(**TINY_STDIT3)
        expected = StepCost(model, "STDiT3")(*batch(2, (5, 4, 4)))
        checkpoint_blocks(model)
        assert StepCost(model, "STDiT3")(*batch(2, (5, 4, 4))) == expected

    def test_frozen_weights_need_no_gradient(self):
        model = STDiT3(**TINY_STDIT3)
        whole = StepCost(model, "STDiT3")(*batch(1, (5, 4, 4)))[1]
        model.requires_grad_(False)
        assert StepCost(model, "STDiT3")(*batch(1, (5, 4, 4)))[1] == pytest.approx(2 / 3 * whole)

    def test_each_shape_is_counted_once(self, monkeypatch):
        cost, shapes = StepCost(STDiT3(**TINY_STDIT3), "STDiT3"), []
        count = CostModel.step
        monkeypatch.setattr(CostModel, "step", lambda *args, **how: shapes.append(1) or count(*args, **how))
        for latent, samples in (((5, 4, 4), 1), ((5, 4, 4), 3), ((1, 4, 4), 1), ((5, 4, 4), 2)):
            cost(*batch(samples, latent))
        assert len(shapes) == 2


class TestPeak:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
            ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
            ("NVIDIA GeForce RTX 4090", 165), ("AMD Instinct MI300X", 1307), ("NVIDIA GH200 480GB", None),
            ("NVIDIA A10G", None), ("", None),
        ],
    )  # fmt: skip
    def test_known_names(self, name, expected):
        assert peak_flops._stated(name) == (expected and expected * 1e12)

    def test_stated_figures_are_for_half_types(self, monkeypatch):
        monkeypatch.setattr(peak_flops, "device_name", lambda _: "NVIDIA H200")
        monkeypatch.setattr(peak_flops, "_measured", lambda _, dtype: 1.0 if dtype is torch.float32 else 2.0)
        peak_flops.peak_flops.cache_clear()
        try:
            assert [peak_flops.peak_flops(CPU, dtype) for dtype in ("bf16", "fp16", "fp32")] == [989e12, 989e12, 1.0]
        finally:
            peak_flops.peak_flops.cache_clear()

    def test_others_are_measured_once(self, monkeypatch):
        measured = peak_flops.peak_flops(CPU, "fp32")
        assert 1e8 < measured < 1e14
        monkeypatch.setattr(peak_flops, "_measured", lambda *_: 0.0)
        assert peak_flops.peak_flops(CPU, "fp32") == measured


class Clock:
    """Time that passes on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)


class TestThroughput:
    def test_a_line(self, monkeypatch):
        clock = Clock(monkeypatch)
        monkeypatch.setattr(throughput, "peak_flops", lambda *_: 1e12)
        done = Throughput(CPU, "bf16")
        for clips in (2, 4):
            done.add(clips, 10 * clips, 1e11 * clips)
            clock.now += 1
        assert done.line(waited=0.5) == {
            "step_s": 1.0, "clips_per_s": 3.0, "tokens_per_s": 30.0, "data_wait": 0.25, "mfu": 0.3,
        }  # fmt: skip

    def test_starts_anew(self, monkeypatch):
        clock, done = Clock(monkeypatch), Throughput(CPU)
        done.add(8)
        clock.now += 4
        done.line(waited=3.0)
        done.add(1)
        clock.now += 2
        assert done.line(waited=3.5) == {"step_s": 2.0, "clips_per_s": 0.5, "data_wait": 0.25}

    def test_step_of_several_batches(self, monkeypatch):
        clock, done = Clock(monkeypatch), Throughput(CPU, per_step=3)
        for _ in range(6):
            done.add(2)
        clock.now += 4
        assert done.line() == {"step_s": 2.0, "clips_per_s": 3.0, "data_wait": 0.0}

    def test_leaves_other_work_out(self, monkeypatch):
        clock, done = Clock(monkeypatch), Throughput(CPU)
        done.add(1)
        clock.now += 60
        done.pause(58)
        assert done.line()["step_s"] == 2.0

    def test_ranks_of_a_sequence_share_a_batch(self, monkeypatch):
        clock = Clock(monkeypatch)
        monkeypatch.setattr(throughput, "peak_flops", lambda *_: 1e12)
        monkeypatch.setattr(throughput, "all_reduce_mean", lambda values, _: values)
        done = Throughput(CPU, layout=RankLayout(rank=0, world_size=4, sequence_size=2))
        done.add(2, 20, 1e12)
        clock.now += 2
        line = done.line()
        assert (line["clips_per_s"], line["tokens_per_s"], line["mfu"]) == (2.0, 20.0, 0.25)


def on_two_ranks() -> dict[str, Any]:
    """The line of ranks that do and wait unequally."""
    from opensora.distributed.process_group import start

    layout = start(CPU)
    throughput.peak_flops = lambda *_: 1e12
    now = [10.0]
    throughput.time.perf_counter = lambda: now[0]
    done = Throughput(CPU, layout=layout)
    done.add(1 + 2 * layout.rank, 10, 1e11)
    now[0] += 1
    return done.line(waited=0.5 * layout.rank)


def test_ranks_are_summed():
    one, other = run(2, on_two_ranks)
    assert one == other
    assert one == {"step_s": 1.0, "clips_per_s": 4.0, "tokens_per_s": 20.0, "data_wait": 0.25, "mfu": 0.1}
