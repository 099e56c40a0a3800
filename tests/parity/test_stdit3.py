"""STDiT3 against the recorded outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from opensora.models.stdit.stdit3 import STDiT3
from tests.parity.cases import Case, discover, part

MODELS = {"STDiT3": STDiT3}
CASES = discover("models/stdit3")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case: Case) -> None:
    facts, tensors = case.facts, case.tensors()
    model = MODELS[facts["model"]](**facts["constructor"]).eval()
    model.load_state_dict(part(tensors, "weights/"), strict=True)
    assert facts["calls"]
    for call in facts["calls"]:
        output = model(**{name: tensors[key] for name, key in call["inputs"].items()})
        torch.testing.assert_close(output, tensors[call["output"]], rtol=1e-4, atol=2e-5)
        if "grads" in call:
            model.zero_grad()
            loss = output.square().sum()
            assert loss.item() == pytest.approx(call["loss_sum_of_squares"], rel=1e-4)
            loss.backward()
            for name, key in call["grads"].items():
                torch.testing.assert_close(model.get_parameter(name).grad, tensors[key], rtol=1e-4, atol=2e-3)
