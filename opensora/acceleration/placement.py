"""Moves a model to a device."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from opensora.acceleration.device import is_cpu

M = TypeVar("M", bound=nn.Module)


def to_device(model: M, device: torch.device) -> M:
    """Moves `model` to `device`; returns it.

    On an accelerator the weights of frozen convolutions become channels-last, the layout of its matrix units.
    """
    model.to(device)
    if not is_cpu(device):
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d) and not module.weight.requires_grad:
                layout = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
                module.weight = nn.Parameter(module.weight.contiguous(memory_format=layout), requires_grad=False)
    return model
