"""Steps that would spoil the weights are noticed before they do, and their cause is named."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.acceleration.activation_checkpointing import checkpoint_blocks
from opensora.config.settings import TrainSettings
from opensora.errors import ConfigError, OpenSoraError
from opensora.models.sizes import size_conditioning
from opensora.models.stdit.stdit3 import STDiT3
from opensora.schedulers.rf import RFLOW
from opensora.training.bad_step_guard import MAX_OVERFLOWS, MIN_NORMS, BadStepGuard
from tests.ranks import run
from tests.tiny import TINY_STDIT3

LABELS = [f"clip{number}" for number in range(32)]


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(model={"type": "STDiT3"}, **{"dtype": "fp32", **changes})


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)
        self.shift = 0.0
        self.clamp: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        if self.clamp is not None:
            x = (x * 0 + self.clamp).sqrt()  # finite at 0, but not its gradient
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self, width: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.enter = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.leave = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


class Loop:
    """A training loop of a few lines around a guard; `data(step)` is [B, 4], `spoil(model, step)` breaks something."""

    def __init__(
        self, data: Callable[[int], Tensor] | None = None, spoil: Callable[[Net, int], None] | None = None,
        each: bool = True, **changes: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.model, self.each = Net(), each
        self.data, self.spoil = data or batch, spoil or (lambda model, step: None)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.lines: list[dict[str, Any]] = []
        self.guard = BadStepGuard(self.model, settings(**changes), report=self.lines.append)
        self.answers: list[str] = []
        self.kept = self.state()

    def state(self) -> list[Tensor]:
        moments = [part for one in self.optimizer.state.values() for part in one.values()]
        return [tensor.detach().clone() for tensor in (*self.model.parameters(), *moments)]

    def losses(self, x: Tensor) -> Tensor:
        return (self.model(x) - x).square().mean(dim=1)

    def step(self, step: int) -> str:
        self.spoil(self.model, step)
        x = self.data(step)
        loss = self.losses(x).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

        def recompute() -> Tensor:
            return self.losses(x) if self.each else self.losses(x).mean()

        answer = self.guard.check(
            loss, norm, LABELS[: len(x)], step, recompute, lambda row: self.losses(x[row : row + 1])
        )
        if answer == "go":
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.answers.append(answer)
        return answer

    def run(self, steps: int) -> list[str]:
        for step in range(steps):
            self.step(step)
        return self.answers


def batch(step: int, count: int = 4) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(step))


def poisoned(at: int, row: int, value: float) -> Callable[[int], Tensor]:
    """Batches, one of which has a sample with a strange number in it."""

    def data(step: int) -> Tensor:
        x = batch(step)
        if step == at:
            x[row, 2] = value
        return x

    return data


def shift(block: int, value: float, at: int | None = None) -> Callable[[Net, int], None]:
    """Adds something to what a block is given, at one step or at all."""

    def spoil(model: Net, step: int) -> None:
        model.blocks[block].shift = value if at in (None, step) else 0.0

    return spoil


def told(loop: Loop) -> dict[str, Any]:
    assert len(loop.lines) == 1
    return loop.lines[0]["bad_step"]


class TestNames:
    def test_nothing_of_good_steps(self):
        loop = Loop()
        assert loop.run(5) == ["go"] * 5 and loop.lines == []
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in loop.model.modules())

    def test_module_with_broken_weights(self):
        def spoil(model: Net, step: int) -> None:
            model.blocks[1].mlp.weight.data[0, 0] = math.nan if step == 2 else 0.1

        loop = Loop(spoil=spoil)
        assert loop.run(4) == ["go", "go", "skip", "go"]
        assert loop.lines[0]["step"] == 2
        event = told(loop)
        assert event["module"] == "blocks.1.mlp" and "its weight is not finite" in event["where"]
        assert "poisoned" not in event and event["samples"] == LABELS[:4]

    def test_module_that_makes_them_of_finite_input(self):
        loop = Loop()
        loop.model.blocks[2].norm.register_forward_hook(lambda _, __, out: out * math.inf)
        loop.step(0)
        assert told(loop)["module"] == "blocks.2.norm" and "finite input" in told(loop)["where"]

    def test_module_whose_own_code_makes_them(self):
        loop = Loop(spoil=shift(1, math.inf))
        loop.step(0)
        assert told(loop)["module"] == "blocks.1" and "before blocks.1.norm" in told(loop)["where"]

    @pytest.mark.parametrize("each", [True, False])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_poisoned_sample(self, each, value):
        loop = Loop(poisoned(at=1, row=3, value=value), each=each)
        assert loop.run(3) == ["go", "skip", "go"]
        event = told(loop)
        assert event["poisoned"] == ["clip3"] and event["samples"] == LABELS[:4]
        assert event["module"] == "enter" and "the batch itself is not finite" in event["where"]

    def test_sample_that_a_module_cannot_bear(self):
        """What is finite in the batch and overflows inside is the sample's doing and has its place."""
        loop = Loop(poisoned(at=0, row=1, value=1e38))
        loop.model.enter.weight.data.fill_(10)
        loop.step(0)
        assert told(loop)["poisoned"] == ["clip1"] and told(loop)["module"] == "enter"
        assert "finite input" in told(loop)["where"]

    def test_parameters_with_bad_gradients_only(self):
        def spoil(model: Net, step: int) -> None:
            model.blocks[1].clamp = 0.0 if step == 1 else None

        loop = Loop(spoil=spoil)
        assert loop.run(3) == ["go", "skip", "go"]
        event = told(loop)
        assert event["what"] == "the gradients are not finite" and "module" not in event
        before = {f"enter.{kind}" for kind in ("weight", "bias")}
        assert before <= set(event["parameters"])
        assert not any(name.startswith(("blocks.2", "leave")) for name in event["parameters"])
        assert "poisoned" not in event

    def test_sample_with_bad_gradients_only(self):
        loop = Loop(lambda step: torch.cat([batch(0)[:2], torch.full((1, 4), 7.0), batch(1)[:1]]))
        loop.losses = lambda x: (loop.model(x) * (x != 7)).square().sum(dim=1).sqrt()  # of a 0, which has no gradient
        loop.step(0)
        assert told(loop)["poisoned"] == ["clip2"] and told(loop)["parameters"] and "module" not in told(loop)

    def test_sample_that_makes_gradients_jump(self):
        loop = Loop(poisoned(at=MIN_NORMS, row=2, value=1e4), max_bad_steps=3)
        assert loop.run(MIN_NORMS + 2) == ["go"] * MIN_NORMS + ["skip", "go"]
        assert told(loop)["what"] == "the gradient norm spikes" and told(loop)["poisoned"] == ["clip2"]

    @pytest.mark.parametrize("whole", [True, False])
    def test_compiled_modules_too(self, whole):
        """They run as they are written, and are not compiled anew for that."""
        loop, compiled = Loop(), []

        def backend(graph: Any, _: Any) -> Any:
            compiled.append(graph)
            return graph.forward

        for block in loop.model.blocks:
            if whole:
                block.compile(backend=backend)
            else:
                block.compile(backend=backend)
        loop.run(2)
        count = len(compiled)
        loop.model.blocks[1].mlp.weight.data[0, 0] = math.inf
        assert loop.step(2) == "skip" and count == len(compiled) > 0
        assert told(loop)["module"] == "blocks.1.mlp"

    def test_part_of_a_transformer_with_checkpointing(self):
        torch.manual_seed(0)
        model, lines = STDiT3(**TINY_STDIT3), []
        checkpoint_blocks(model)
        model.temporal_blocks[1].attn.qkv.weight.data[3, 3] = math.inf
        told = size_conditioning("STDiT2", 2, (32, 32), 17, 24)
        latents, y = torch.randn(2, 4, 5, 4, 4), torch.randn(2, 1, 6, 32)

        def recompute() -> Tensor:
            source = torch.Generator().manual_seed(0)
            return RFLOW().training_loss(model, latents, {"y": y, **told}, generator=source)

        loss = recompute().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert (
            BadStepGuard(model, settings(), report=lines.append).check(loss, norm, ["a", "b"], 1, recompute) == "skip"
        )
        assert lines[0]["bad_step"]["module"] == "temporal_blocks.1.attn.qkv"

    def test_fault_that_does_not_come_again(self):
        loop = Loop()
        once = iter([math.nan])
        loop.model.leave.register_forward_hook(lambda _, __, out: out * next(once, 1.0))
        assert loop.run(2) == ["skip", "go"]
        assert "finite when repeated" in told(loop)["where"] and "module" not in told(loop)

    def test_no_more_than_is_known(self):
        guard = BadStepGuard(Net(), settings())
        assert guard.check(torch.tensor(math.nan), torch.tensor(1.0), ["a"], 4) == "skip"

    def test_log_line_is_strict_json(self):
        loop = Loop(poisoned(at=0, row=0, value=math.nan))
        loop.step(0)
        assert json.loads(json.dumps(loop.lines[0], allow_nan=False))["bad_step"]["loss"] == "nan"


class TestPolicy:
    def test_skipped_step_leaves_no_trace(self):
        """What follows is what a run without that step does."""
        loop, other = Loop(poisoned(at=2, row=0, value=math.nan)), Loop()
        for step in range(5):
            before = loop.state()
            loop.step(step)
            if step == 2:
                assert all(torch.equal(a, b) for a, b in zip(before, loop.state(), strict=True))
            else:
                other.step(step)
        assert all(torch.equal(a, b) for a, b in zip(loop.state(), other.state(), strict=True))

    def test_skips_are_told(self, caplog):
        with caplog.at_level(logging.WARNING, "opensora"):
            Loop(poisoned(at=0, row=1, value=math.nan)).step(0)
        assert "step 0: the loss is not finite" in caplog.text and "caused by the sample clip1" in caplog.text

    def test_roll_back(self):
        assert Loop(poisoned(at=1, row=0, value=math.nan), on_bad_step="rollback").run(3) == ["go", "roll back", "go"]

    def test_stop(self):
        loop = Loop(poisoned(at=1, row=2, value=math.nan), on_bad_step="stop")
        with pytest.raises(OpenSoraError, match=r"^step 1: the loss is not finite .*sample clip2.*remove that sample"):
            loop.run(3)
        assert told(loop)["action"] == "stop" and all(one.isfinite().all() for one in loop.state())

    def test_stops_after_so_many_in_a_row(self):
        loop = Loop(spoil=shift(0, math.nan), max_bad_steps=3)
        with pytest.raises(OpenSoraError, match=r"blocks\.0.*3 bad steps in a row; .*--load and a lower lr"):
            loop.run(5)
        assert loop.answers == ["skip", "skip"] and len(loop.lines) == 3

    def test_good_steps_between_start_the_count_anew(self):
        loop = Loop(lambda step: batch(step) * (math.nan if step % 3 else 1), max_bad_steps=3)
        assert loop.run(9) == ["go", "skip", "skip"] * 3

    def test_spikes_may_be_allowed(self):
        data = poisoned(at=MIN_NORMS, row=2, value=1e4)
        assert Loop(data, spike_factor=0).run(MIN_NORMS + 1)[-1] == "go"
        assert Loop(data, spike_factor=1e9).run(MIN_NORMS + 1)[-1] == "go"

    def test_too_few_steps_to_know_what_is_usual(self):
        assert Loop(poisoned(at=MIN_NORMS - 1, row=2, value=1e4)).run(MIN_NORMS)[-1] == "go"

    @pytest.mark.parametrize("wrong", [{"on_bad_step": "retry"}, {"max_bad_steps": 0}, {"spike_factor": -1}])
    def test_settings_are_checked(self, wrong):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            settings(**wrong)


class TestOverflow:
    def check(self, guard: BadStepGuard, norm: float) -> str:
        return guard.check(torch.tensor(1.0), torch.tensor(norm))

    def test_is_left_to_the_scaler(self):
        guard = BadStepGuard(Net(), settings(dtype="fp16"))
        for _ in range(2):
            assert [self.check(guard, math.inf) for _ in range(MAX_OVERFLOWS)] == ["go"] * MAX_OVERFLOWS
            assert self.check(guard, 1.0) == "go"

    def test_unless_no_scale_helps(self):
        guard = BadStepGuard(Net(), settings(dtype="fp16"))
        answers = [self.check(guard, math.inf) for _ in range(MAX_OVERFLOWS + 1)]
        assert answers[-1] == "skip" and set(answers[:-1]) == {"go"}

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_is_none_in_other_types(self, dtype):
        assert self.check(BadStepGuard(Net(), settings(dtype=dtype)), math.inf) == "skip"

    def test_a_loss_that_is_not_finite_is_none(self):
        guard = BadStepGuard(Net(), settings(dtype="fp16"))
        assert guard.check(torch.tensor(math.nan), torch.tensor(math.nan)) == "skip"


def test_resumed_guard_judges_as_the_one_before():
    guards = [BadStepGuard(Net(), settings(max_bad_steps=2)) for _ in range(2)]
    loss = torch.tensor(1.0)
    for step in range(MIN_NORMS + 10):
        guards[0].check(loss, torch.tensor(1 + 0.01 * step), step=step)
    assert guards[1].check(loss, torch.tensor(40.0)) == "go"  # it knows nothing yet
    assert guards[0].check(loss, torch.tensor(40.0)) == "skip"
    guards[1].load_state_dict(json.loads(json.dumps(guards[0].state_dict())))
    for guard in guards:
        with pytest.raises(OpenSoraError, match="2 bad steps in a row"):
            guard.check(loss, torch.tensor(40.0))
    assert guards[0].state_dict() == guards[1].state_dict()


def on_two_ranks() -> list[Any]:
    """The answers and what is told on a rank whose neighbour alone has a bad sample; then a broken weight of all."""
    from opensora.distributed.fsdp import clip_grad_norm, shard
    from opensora.distributed.process_group import start

    layout = start(torch.device("cpu"))
    torch.manual_seed(0)
    model, lines = Net(), []
    shard(model, layout, torch.float32)
    guard = BadStepGuard(model, settings(), layout, lines.append)
    answers = []
    for step in range(4):
        count = 3 + layout.rank  # ranks may have batches of several sizes
        x, names = batch(step, count), [f"{layout.rank}/{row}" for row in range(count)]
        if step == 1 and layout.rank == 1:
            x[3] = math.nan
        if step == 2:
            model.blocks[1].shift = math.nan
        if step == 3:
            model.blocks[1].shift, model.blocks[1].clamp = 0.0, 0.0

        def recompute(x: Tensor = x) -> Tensor:
            return (model(x) - 1).square().mean(dim=1)

        loss = recompute().mean()
        loss.backward()
        norm = clip_grad_norm(model.parameters())
        answers.append(guard.check(loss, norm, names, step, recompute))
        model.zero_grad()
    return [answers, lines]


def test_ranks_agree_and_name_the_sample_of_any():
    (answers, lines), (others, silent) = run(2, on_two_ranks)
    assert answers == others == ["go", "skip", "skip", "skip"] and silent == []
    first, second, third = (line["bad_step"] for line in lines)
    assert first["poisoned"] == ["1/3"] and len(first["samples"]) == 7 and "batch itself" in first["where"]
    assert second["module"] == "blocks.1" and "poisoned" not in second
    assert "enter.weight" in third["parameters"] and "leave.weight" not in third["parameters"]
