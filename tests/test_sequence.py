"""One rank, two ranks with sharded parameters, and 2, 3 or 2 x 2 ranks of a sequence: the same losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora import registry
from opensora.acceleration.activation_checkpointing import checkpoint_blocks
from opensora.distributed import collectives, fsdp
from opensora.distributed.parallelize import parallelize
from opensora.distributed.process_group import RankLayout, start
from opensora.distributed.sequence_parallel import check_divisible, sequence_parallel
from opensora.errors import ConfigError
from opensora.schedulers.rf import RFLOW
from tests.full import FULL, count
from tests.ranks import run

STEPS, BATCH, TOLERANCE = count(2, 5), 2, 1e-5
SIZE = (5, 10, 10)  # latent frames, rows, columns: 25 patches a frame
TEXT: dict[str, Any] = dict(caption_channels=16, model_max_length=8)
SMALL: dict[str, Any] = dict(hidden_size=36, depth=2, num_heads=3, **TEXT)
KINDS: dict[str, dict[str, Any]] = {
    "STDiT3": dict(qk_norm=True),
    "STDiT2": dict(qk_norm=True),
    "STDiT": dict(input_size=SIZE),
    "Latte": dict(input_size=SIZE, condition="label_5"),
    "DiT": dict(input_size=SIZE, condition="label_5"),
    "PixArt": dict(input_size=SIZE),
    "PixArtMS": dict(input_size=SIZE),
    "PixArt-Sigma": dict(
        input_size=(5, 4, 12),
        kv_compress_config=dict(sampling="conv", scale_factor=2, kv_compress_layer=[1]),
    ),
}
# By default models that share their blocks with others stand aside.
TRAINED = [kind for kind in KINDS if FULL or kind in ("STDiT3", "STDiT2", "STDiT", "Latte", "PixArt-Sigma")]


def make(kind: str) -> nn.Module:
    """A small model with random weights, all of which have an effect."""
    torch.manual_seed(0)
    model = registry.build({"type": kind, **SMALL, **KINDS[kind]})
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif parameter.requires_grad:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.double().train()  # so that what is left of rounding is not blown up by AdamW


def batch(kind: str, step: int) -> tuple[Tensor, dict[str, Any], Tensor]:
    """The latents [4, 4, T, H, W] of a step, what the model is told, and which frames are generated."""
    draw = torch.Generator().manual_seed(step)
    size = KINDS[kind].get("input_size", SIZE)
    cond: dict[str, Any] = {"y": torch.randn(BATCH, 1, 8, 16, generator=draw)}
    cond["mask"] = torch.arange(8) < torch.randint(1, 9, (BATCH, 1), generator=draw)
    told = dict(fps=24.0, height=48.0, width=80.0, num_frames=9.0, ar=0.6)
    cond |= {name: torch.full((BATCH,), value) for name, value in told.items()}
    cond |= {"hw": torch.tensor([[48.0, 80.0]] * BATCH)}
    if kind == "PixArtMS":
        cond["ar"] = cond["ar"][:, None]
    if kind in ("DiT", "Latte"):
        cond["y"] = torch.randint(0, 5, (BATCH,), generator=draw)
        del cond["mask"]
    given = torch.rand(BATCH, size[0], generator=draw) < 0.7
    return torch.randn(BATCH, 4, *size, generator=draw), cond, given


def loss_of(model: nn.Module, kind: str, step: int, rows: slice) -> Tensor:
    """The flow loss of some rows of a step's batch; noise and time are those of the whole batch."""
    x, cond, given = batch(kind, step)
    draw = torch.Generator().manual_seed(100 + step)
    noise, time = torch.randn(x.shape, generator=draw), torch.rand(len(x), generator=draw)
    cond = {name: value[rows] for name, value in cond.items()}
    mask = given[rows] if kind.startswith("STDiT") else None
    some = {"noise": noise[rows], "time": time[rows], "mask": mask}
    return RFLOW().training_loss(model, x[rows], cond, **some).mean()


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(kind: str, sequence_size: int = 1, steps: int = STEPS, parts: int = 1, **how: Any) -> dict[str, Any]:
    """The losses, the norms and the clipped gradients of all steps of AdamW.

    Each step takes the rank's share of the batch in `parts`.
    """
    layout = start(torch.device("cpu"), sequence_size)
    model = make(kind)
    parallelize(model, layout, torch.float32, **how)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, fused=True)
    losses, norms, gradients = [], [], []
    share = BATCH // layout.data_size
    for step in range(steps):
        total = torch.zeros(())
        for part in range(parts):
            first = layout.data_rank * share + part * share // parts
            loss = loss_of(model, kind, step, slice(first, first + share // parts)) / parts
            loss.backward()
            total += loss.detach()
        losses.append(collectives.all_reduce_mean(total, layout))
        norms.append(fsdp.clip_grad_norm(trained.values(), 1.0))
        gradients.append({name: full(p.grad) for name, p in trained.items()})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"losses": losses, "norms": norms, "gradients": gradients}


def assert_same(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    """Each number to 1e-5 of itself, those of a gradient to 1e-5 of its largest."""
    for step, pairs in enumerate(zip(*(zip(*one.values(), strict=True) for one in (found, expected)), strict=False)):
        ours, theirs = ({"loss": loss, "norm": norm, **gradient} for loss, norm, gradient in pairs)
        errors = {part: float((ours[part] - theirs[part]).abs().max() / theirs[part].abs().max()) for part in theirs}
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < TOLERANCE, f"{name}, step {step}: {worst} is off by {errors[worst]:.1e}"


def on_two_ranks() -> dict[str, Any]:
    found = {f"{kind}, sharded": train(kind, 1, 2) for kind in TRAINED[1 : count(2, 3)]}
    found |= {f"{kind}, sequence": train(kind, 2, 1 if "STDiT" not in kind else 2) for kind in TRAINED[1:]}
    found["STDiT3, sharded"] = train("STDiT3")
    found["STDiT3, sharded and checkpointed"] = train("STDiT3", grad_checkpoint=True)
    found["STDiT3, sequence"] = train("STDiT3", 2)
    found["STDiT3, sequence, checkpointed and accumulated"] = train("STDiT3", 2, parts=2, grad_checkpoint=True)
    return found


def on_three_ranks() -> dict[str, Any]:
    return {f"{kind}, sequence": train(kind, 3, steps=steps_of(kind)) for kind in ("STDiT", "STDiT2", "STDiT3")}


def on_four_ranks() -> dict[str, Any]:
    return {"STDiT3, 2 x 2": train("STDiT3", 2), "STDiT, 2 x 2": train("STDiT", 2, 2, grad_checkpoint=True)}


def steps_of(kind: str) -> int:
    return STEPS if kind == "STDiT3" else 2


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Single-rank training of each kind."""
    return {kind: train(kind, steps=steps_of(kind)) for kind in TRAINED}


@pytest.mark.parametrize(
    ("ranks", "function"), [(2, on_two_ranks), (3, on_three_ranks), (4, on_four_ranks)][: count(1, 3)]
)
def test_ranks_change_nothing(alone, ranks, function):
    for found in run(ranks, function):
        for name, one in found.items():
            assert_same(one, alone[name.split(",")[0]], name)


@pytest.mark.parametrize("how", [{"grad_checkpoint": True}, {"parts": 2}, {"parts": 2, "grad_checkpoint": True}])
def test_checkpointing_and_accumulation_change_nothing(alone, how):
    assert_same(train("STDiT3", **how), alone["STDiT3"], str(how))


def test_checkpointing_computes_blocks_twice():
    model, calls = make("STDiT3"), []
    checkpoint_blocks(model)
    for block in model.spatial_blocks:
        block.mlp.register_forward_hook(lambda *_: calls.append(1))
    loss_of(model, "STDiT3", 0, slice(BATCH)).backward()
    assert len(calls) == 2 * len(model.spatial_blocks)


def test_models_that_cannot_be_split_say_so():
    with pytest.raises(ConfigError, match="Linear cannot be split over ranks; STDiT, STDiT2, STDiT3"):
        sequence_parallel(nn.Linear(2, 2), RankLayout(0, 2, 2))
    check_divisible(nn.Linear(2, 2), RankLayout(0, 2, 1))
