"""Moves a model to a device and replaces its modules by those that are fastest there."""

from __future__ import annotations

import torch
from torch import nn

from opensora.acceleration.device import is_cpu
from opensora.acceleration.kernels.attention import cpu_attention_module
from opensora.acceleration.kernels.causal_conv import folded_causal_conv
from opensora.acceleration.kernels.layout import channels_last, outputs_last, pairwise_group_norm, release_file
from opensora.acceleration.kernels.linear import onednn_module
from opensora.acceleration.kernels.winograd import winograd_module
from opensora.acceleration.replace_modules import is_frozen, replace_modules


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Moves `model` to `device` and replaces its frozen modules by faster ones; returns the model.

    Trained modules stay as they are, except that a CPU computes causal convolutions frame by frame. Names in the state
    dict stay. The returned model is another object if the model itself is one of the replaced modules.
    """
    on_cpu, folds = is_cpu(device), folds_time(device, _is_half(model))

    def replacement(module: nn.Module) -> nn.Module:
        if folds:
            module = folded_causal_conv(module)
        if not is_frozen(module):
            return module
        if on_cpu:
            module = winograd_module(cpu_attention_module(onednn_module(module)))
        return pairwise_group_norm(module)

    model = replace_modules(model, replacement).to(device)
    copied = channels_last(model, frame_by_frame=folds)
    if on_cpu:
        release_file(model, copied + outputs_last(model))
    return model


def folds_time(device: torch.device, half: bool) -> bool:
    """Whether `device` computes causal convolutions frame by frame, which half precision would round too often."""
    return is_cpu(device) and not half


def _is_half(model: nn.Module) -> bool:
    return any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters())
