"""Nearest-neighbour upsampling and the convolution after it as one operation.

Of the 3 x 3 pixels under a kernel in an upsampled image at most 2 x 2 differ. The weights of equal pixels are added up
first: four 2 x 2 kernels, one for each parity of row and column, take 4/9 of the multiplications, and the upsampled
input is never stored. Where it pays, the four share products (see `winograd`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.acceleration.kernels.winograd import UPSAMPLED, TransformedKernels, suits, version
from opensora.acceleration.replace_modules import is_frozen


class UpsampleConv2d(nn.Module):
    """x [N, C, H, W] -> [N, O, 2 H, 2 W]: `conv`, 3 x 3, of x upsampled by repeating its pixels.

    Takes the place of an Upsample2D of diffusers and shares its `conv`.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self._parity_kernels: tuple[Any, Tensor] | None = None  # for a version of the weight
        self._winograd = TransformedKernels(conv, UPSAMPLED)

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        if output_size is not None:
            return self.conv(F.interpolate(x, size=output_size, mode="nearest"))
        if suits(x, self.conv.weight, UPSAMPLED.step):
            return self._winograd.convolve(x)
        bias = None if self.conv.bias is None else self.conv.bias.repeat(4)
        parts = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.parity_kernels(), bias).chunk(4, dim=1)  # [N, O, H + 1, W + 1]
        height, width = x.shape[2:]
        last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        shape = (len(x), parts[0].shape[1], 2 * height, 2 * width)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        for number, part in enumerate(parts):
            row, column = divmod(number, 2)
            out[:, :, row::2, column::2] = part[:, :, row : row + height, column : column + width]
        return out

    def parity_kernels(self) -> Tensor:
        """The four kernels by parity of row and column, [4 O, C, 2, 2]; recomputed when the weight changes."""
        weight = self.conv.weight
        if self._parity_kernels is None or self._parity_kernels[0] != version(weight):
            kernels = torch.cat([each for rows in _by_parity(weight.float(), 2) for each in _by_parity(rows, 3)])
            kernels = kernels.to(weight.dtype).contiguous(memory_format=torch.channels_last)
            self._parity_kernels = version(weight), kernels
        return self._parity_kernels[1]


def _by_parity(kernel: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Three taps along an axis as the two taps of an even pixel, and the two of an odd one."""
    first, middle, last = kernel.split(1, dim=axis)
    return torch.cat((first, middle + last), dim=axis), torch.cat((first + middle, last), dim=axis)


def upsample_conv(module: nn.Module) -> nn.Module:
    """The `UpsampleConv2d` of a frozen Upsample2D that it can compute; other modules are returned."""
    # by name, because importing diffusers takes seconds
    return UpsampleConv2d(module.conv) if type(module).__name__ == "Upsample2D" and _fits(module) else module


def _fits(module: Any) -> bool:
    conv = getattr(module, "conv", None)
    return (
        isinstance(conv, nn.Conv2d)
        and (conv.kernel_size, conv.padding, conv.stride) == ((3, 3), (1, 1), (1, 1))
        and module.interpolate
        and module.norm is None
        and is_frozen(module)
    )
