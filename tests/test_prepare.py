"""Conditioning that is prepared once for all steps: it gives the same, and never the result of another size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.models.pixart.pixart import PixArtMS
from opensora.models.stdit.stdit2 import STDiT2
from opensora.models.stdit.stdit3 import STDiT3
from tests.test_plain import error, randomize

SHAPE, LARGER = (2, 4, 3, 6, 8), (2, 4, 3, 6, 10)
SIZES = {"fps": 24.0, "height": 48.0, "width": 64.0, "num_frames": 17.0, "ar": 0.75}
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[str, ...]]] = {
    "STDiT3": (STDiT3, {}, ("fps", "height", "width")),
    "STDiT2": (STDiT2, {}, ("fps", "height", "width", "num_frames", "ar")),
    "PixArtMS": (PixArtMS, {"input_size": SHAPE[2:]}, ("hw", "ar")),
}


def build(kind: str) -> nn.Module:
    cls, more, _ = KINDS[kind]
    sizes = dict(hidden_size=48, depth=2, num_heads=4, in_channels=4, caption_channels=24, model_max_length=9)
    model = cls(**sizes, **more)
    randomize(model)
    return model.eval().requires_grad_(False)


def conditioning(kind: str, **changes: float) -> dict[str, Tensor]:
    sizes = {**SIZES, **changes}
    values = {name: torch.tensor([value]) for name, value in sizes.items()}
    values["hw"] = torch.tensor([[sizes["height"], sizes["width"]]])
    y = torch.randn(2, 1, 9, 24, generator=torch.Generator().manual_seed(1))
    return {"y": y, **{name: values[name] for name in KINDS[kind][2]}}


def latents(shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.tensor([871.0])


CASES = [(kind, name) for kind, (_, _, names) in KINDS.items() for name in names if name != "hw"]
CASES += [("PixArtMS", "height"), ("PixArtMS", "width")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_another_size_never_gives_the_result_of_the_first(kind: str, name: str) -> None:
    model, (x, timestep) = build(kind), latents()
    first, other = conditioning(kind), conditioning(kind, **{name: 2 * SIZES[name]})
    prepared = model.prepare(x.shape, **first)
    of_first = model(x, timestep, **prepared)
    assert error(of_first, model(x, timestep, **first)) < 1e-6
    changed = {key: value for key, value in other.items() if not torch.equal(value, first[key])}
    with pytest.raises(ValueError, match=f"{next(iter(changed))}.*prepare it again"):
        model(x, timestep, **{**prepared, **changed})
    of_other = model(x, timestep, **model.prepare(x.shape, **other))
    assert error(of_other, model(x, timestep, **other)) < 1e-6 < error(of_other, of_first)
    assert torch.equal(model(x, timestep, **prepared), of_first)


@pytest.mark.parametrize("kind", ["STDiT3", "STDiT2"])
def test_other_latents_are_refused(kind: str) -> None:
    model, (x, timestep) = build(kind), latents()
    prepared = model.prepare(LARGER, **conditioning(kind))
    with pytest.raises(ValueError, match=r"latents \[2, 4, 3, 6, 10\], not \[2, 4, 3, 6, 8\]; prepare it again"):
        model(x, timestep, **prepared)


@pytest.mark.parametrize("kind", KINDS)
def test_no_embedding_of_text_and_sizes_is_left_to_the_steps(kind: str) -> None:
    model, (x, timestep) = build(kind), latents()
    prepared, calls = model.prepare(x.shape, **conditioning(kind)), []
    for name, module in model.named_modules():
        if name.endswith(("y_embedder", "size_embedder", "ar_embedder", "fl_embedder", "fps_embedder", "kv_linear")):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(x, timestep, **prepared)
    assert not calls
    model(x, timestep, **conditioning(kind))
    assert calls


def test_a_model_without_text_is_refused() -> None:
    with pytest.raises(ValueError, match="STDiT3 needs y"):
        build("STDiT3")(*latents())
