"""Residual blocks of image autoencoders with fewer passes over what they hold: in place, and no division by one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from opensora.acceleration.kernels.linear import needs_gradients

KINDS = ("ResnetBlock2D",)  # of diffusers, which is not imported here


def fuse_residuals(model: nn.Module) -> None:
    """Replaces the residual blocks of autoencoders whose weights are fixed."""
    for module in model.modules():
        if type(module).__name__ in KINDS and _fits(module):
            module.forward = Residual(module)


def _fits(module: Any) -> bool:
    return (
        module.time_emb_proj is None
        and module.upsample is None
        and module.downsample is None
        and module.output_scale_factor == 1
        and isinstance(module.nonlinearity, nn.SiLU)
        and not module.conv1.weight.requires_grad
    )


class Residual:
    """x [N, C, H, W] -> [N, O, H, W]: x (through its shortcut, if it has one) plus two convolutions of its norms."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def __call__(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        block = self.block
        if temb is not None or needs_gradients(x) or block.training:
            return type(block).forward(block, x, temb)
        hidden = block.conv1(F.silu(block.norm1(x), inplace=True))
        hidden = block.conv2(F.silu(block.norm2(hidden), inplace=True))
        return hidden.add_(x if block.conv_shortcut is None else block.conv_shortcut(x))
