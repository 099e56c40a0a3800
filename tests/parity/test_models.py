"""Every diffusion transformer against the recorded outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.models.dit.dit import DiT
from opensora.models.latte.latte import Latte
from opensora.models.pixart.pixart import PixArt, PixArtMS
from opensora.models.pixart.pixart_sigma import PixArt_Sigma
from opensora.models.stdit.stdit import STDiT
from opensora.models.stdit.stdit2 import STDiT2
from opensora.models.stdit.stdit3 import STDiT3
from tests.parity.cases import Case, discover, part

MODELS = {model.__name__: model for model in (DiT, Latte, PixArt, PixArtMS, PixArt_Sigma, STDiT, STDiT2, STDiT3)}


def arguments(inputs: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments of a call; a dotted name is a key of a dict argument."""
    found: dict[str, Any] = {}
    for name, key in inputs.items():
        outer, _, inner = name.partition(".")
        if inner:
            found.setdefault(outer, {})[inner] = tensors[key]
        else:
            found[outer] = tensors[key]
    return found


@pytest.mark.parametrize("case", discover("models", "*/*.json"), ids=str)
def test_outputs_and_gradients(case: Case) -> None:
    facts, tensors = case.facts, case.tensors()
    model = MODELS[facts["model"]](**facts["constructor"]).eval()
    model.load_state_dict(part(tensors, "weights/"), strict=True)
    assert facts["calls"]
    for call in facts["calls"]:
        output = model(**arguments(call["inputs"], tensors))
        torch.testing.assert_close(output, tensors[call["output"]], rtol=1e-4, atol=2e-5)
        if "grads" in call:
            model.zero_grad()
            loss = output.square().sum()
            assert loss.item() == pytest.approx(call["loss_sum_of_squares"], rel=1e-4)
            loss.backward()
            for name, key in call["grads"].items():
                torch.testing.assert_close(model.get_parameter(name).grad, tensors[key], rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("case", discover("models", "*/*.json"), ids=str)
def test_positions_are_those_of_the_reference(case: Case) -> None:
    """The position buffers of a new model, which the outputs above took from the recorded weights."""
    facts, weights = case.facts, part(case.tensors(), "weights/")
    for name, value in MODELS[facts["model"]](**facts["constructor"]).state_dict().items():
        if name.startswith("pos_embed"):
            torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-5)
