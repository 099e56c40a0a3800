"""Doubling an image and convolving it in one: four convolutions with kernels of 2 x 2, one for each parity of a pixel.

Of the 3 x 3 pixels under a kernel in a doubled image at most 2 x 2 differ, so the weights of equal ones are added up
first: 4/9 of the multiplications, and the doubled input is never made. Where it pays, the four share products, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.acceleration.kernels.winograd import DOUBLED, Kernels, suits, version

KINDS = ("Upsample2D",)  # of diffusers, which is not imported here


def fuse_upsampling(model: nn.Module) -> None:
    """Replaces the doubling layers of autoencoders whose weights are fixed."""
    for module in model.modules():
        if type(module).__name__ in KINDS and _fits(module):
            module.forward = Doubled(module.conv)


def _fits(module: Any) -> bool:
    conv = getattr(module, "conv", None)
    return (
        isinstance(conv, nn.Conv2d)
        and (conv.kernel_size, conv.padding, conv.stride) == ((3, 3), (1, 1), (1, 1))
        and module.interpolate
        and module.norm is None
        and not conv.weight.requires_grad
    )


class Doubled:
    """x [N, C, H, W] -> [N, O, 2 H, 2 W]: `conv` of the x that is doubled by repeating its pixels."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.conv = conv
        self.made: tuple[Any, Tensor] | None = None
        self.shared = Kernels(conv, DOUBLED)

    def __call__(self, x: Tensor, output_size: Any = None) -> Tensor:
        if output_size is not None:
            return self.conv(F.interpolate(x, size=output_size, mode="nearest"))
        if suits(x, self.conv.weight, DOUBLED.step):
            return self.shared.convolve(x)
        bias = None if self.conv.bias is None else self.conv.bias.repeat(4)
        parts = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.kernels(), bias).chunk(4, dim=1)  # [N, O, H + 1, W + 1] each
        height, width = x.shape[2:]
        last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        shape = (len(x), parts[0].shape[1], 2 * height, 2 * width)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        for number, part in enumerate(parts):
            row, column = divmod(number, 2)
            out[:, :, row::2, column::2] = part[:, :, row : row + height, column : column + width]
        return out

    def kernels(self) -> Tensor:
        """The four kernels, by the parity of row and column, [4 O, C, 2, 2]; made again when the weights change."""
        weight = self.conv.weight
        if self.made is None or self.made[0] != version(weight):
            made = torch.cat([each for rows in _halves(weight.float(), 2) for each in _halves(rows, 3)])
            self.made = version(weight), made.to(weight.dtype).contiguous(memory_format=torch.channels_last)
        return self.made[1]


def _halves(kernel: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Three taps along an axis as the two that an even pixel sees, and the two that an odd one sees."""
    first, middle, last = kernel.split(1, dim=axis)
    return torch.cat((first, middle + last), dim=axis), torch.cat((first + middle, last), dim=axis)
