"""Exponential moving average of a model's trainable parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """shadow <- decay * shadow + (1 - decay) * parameter after every step; frozen tensors are taken as they are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the shadow towards the model's present parameters."""
        parameters = dict(self.model.named_parameters())
        torch._foreach_lerp_(
            list(self.shadow.values()), [parameters[name].detach() for name in self.shadow], 1.0 - self.decay
        )

    def state_dict(self) -> dict[str, Tensor]:
        """A complete state dict of the model, its trainable parameters averaged."""
        return {**self.model.state_dict(), **self.shadow}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes the averaged parameters back from `state_dict()`."""
        for name, tensor in self.shadow.items():
            tensor.copy_(state[name])
