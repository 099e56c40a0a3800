"""The running average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opensora.errors import WeightsError
from opensora.training.ema import EMA


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.pos_embed = nn.Parameter(torch.zeros(2))
        self.register_buffer("count", torch.zeros(1))


def test_only_trainable_parameters_follow() -> None:
    model = Small()
    ema = EMA(model, decay=0.75)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor += 1
    ema.update()
    moved = {name: (ema.state_dict()[name] - tensor).abs().max().item() for name, tensor in before.items()}
    assert moved == pytest.approx(
        {"layer.weight": 0.25, "layer.bias": 0.25, "frozen": 0, "pos_embed": 0, "count": 0}, abs=1e-6
    )


def test_state_comes_back_whole() -> None:
    model, other = Small(), Small()
    ema = EMA(model, 0.5)
    ema.load_state_dict(EMA(other, 0.5).state_dict())
    for name, tensor in other.state_dict().items():
        assert torch.equal(ema.state_dict()[name], tensor)
    assert not torch.equal(model.layer.weight, other.layer.weight)


def test_state_of_another_model_is_refused() -> None:
    state = EMA(Small(), 0.5).state_dict()
    del state["frozen"]
    with pytest.raises(WeightsError, match="lack 1 tensors of the model, such as frozen"):
        EMA(Small(), 0.5).load_state_dict(state)
