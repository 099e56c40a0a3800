"""Exponential moving average of a model's trainable parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opensora.distributed.fsdp import local_shard
from opensora.distributed.full_state_dict import copy_full
from opensora.errors import WeightsError
from opensora.training.adapter import trained_state


class EMA:
    """shadow <- decay * shadow + (1 - decay) * parameter, for trainable parameters except `pos_embed`.

    Every other tensor of the model's `trained_state` keeps its initial value. Each rank averages its own shards.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: tensor.detach().clone() for name, tensor in trained_state(model).items()}
        followed = {name: p for name, p in model.named_parameters() if p.requires_grad and name != "pos_embed"}
        self.parameters = [local_shard(parameter) for parameter in followed.values()]
        self.averaged = [local_shard(self.shadow[name]) for name in followed]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the shadow towards the current parameters."""
        torch._foreach_lerp_(self.averaged, self.parameters, 1.0 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The model's `trained_state`, its trainable parameters averaged."""
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads a full `state_dict()` into the shards. Raises WeightsError when a tensor is missing."""
        if absent := sorted(self.shadow.keys() - state.keys()):
            raise WeightsError(f"the averaged weights lack {len(absent)} tensors of the model, such as {absent[0]}")
        for name, tensor in self.shadow.items():
            copy_full(tensor, state[name])
