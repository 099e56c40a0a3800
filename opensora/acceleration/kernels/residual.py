"""Residual blocks of image autoencoders with fewer passes over memory: in-place activations and sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.acceleration.replace_modules import is_frozen


class FusedResidual(nn.Module):
    """x [N, C, H, W] -> [N, O, H, W]: x (through its shortcut, if it has one) plus two normalised convolutions.

    Takes the place of a ResnetBlock2D of diffusers and shares its parts.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.conv1 = block.norm1, block.conv1
        self.norm2, self.conv2 = block.norm2, block.conv2
        self.conv_shortcut = block.conv_shortcut

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        assert temb is None, "the block has no time embedding"
        inplace = not torch.is_grad_enabled()
        hidden = self.conv1(F.silu(self.norm1(x), inplace=inplace))
        hidden = self.conv2(F.silu(self.norm2(hidden), inplace=inplace))
        skip = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return hidden.add_(skip) if inplace else hidden + skip


def fused_residual(module: nn.Module) -> nn.Module:
    """The `FusedResidual` of a frozen ResnetBlock2D that it can compute; other modules are returned."""
    # by name, because importing diffusers takes seconds
    return FusedResidual(module) if type(module).__name__ == "ResnetBlock2D" and _fits(module) else module


def _fits(block: Any) -> bool:
    return (
        block.time_emb_proj is None
        and block.time_embedding_norm == "default"
        and block.upsample is None
        and block.downsample is None
        and block.output_scale_factor == 1
        and block.dropout.p == 0
        and isinstance(block.nonlinearity, nn.SiLU)
        and is_frozen(block)
    )
