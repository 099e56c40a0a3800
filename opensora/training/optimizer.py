"""The optimizer of a run."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora.acceleration.device import optimizer_kernels
from opensora.config.settings import TrainSettings


def make_optimizer(parameters: list[Tensor], settings: TrainSettings, device: torch.device) -> torch.optim.AdamW:
    """AdamW as the settings have it, by the fastest kernels of the device."""
    how = dict(betas=settings.adam_betas, eps=settings.adam_eps, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(parameters, lr=settings.lr, **how, **optimizer_kernels(device))
