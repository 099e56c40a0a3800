"""Convolutions of float32 on a CPU with fewer products (Winograd 1980; Lavin and Gray 2016, arXiv:1509.09308).

Outputs that lie side by side share products: along an axis, two of a kernel of three taps need four products instead
of six, and two of an image that is doubled first need three. An image has two axes: 16 products or 9 instead of 36.
The products of all places together are products of matrices. What is added before and after rounds no worse than the
longer sums of the direct way do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opensora.acceleration import linear
from opensora.acceleration.linear import WIDE, has_onednn, needs_gradients, product

FEW, TILES = 64, 1024  # tiles of two by two outputs that are not worth it, and that are computed at once


class Filter(NamedTuple):
    """Two outputs along an axis from `step` + 2 inputs a, b, c, ..., which begin one before the tile."""

    step: int  # from the inputs of one tile to those of the next
    of_kernel: Callable[..., Sequence[Tensor]]  # its three taps, as what is multiplied
    of_inputs: Callable[..., Sequence[Tensor]]  # by this
    outputs: Callable[..., tuple[Tensor, Tensor]]  # made of those products, which are lost, and put where `out` says


TWO_OF_THREE = Filter(  # Lavin and Gray, F(2, 3)
    2,
    lambda a, b, c: (a, (a + b + c) / 2, (a - b + c) / 2, c),
    lambda a, b, c, d: (a - c, b + c, c - b, b - d),
    lambda p, q, r, s, out: (torch.add(q + r, p, out=out[0]), torch.sub(q.sub_(r), s, out=out[1])),
)
DOUBLED = Filter(  # inputs a, b, c become a, b, b, c: the even output sees the first three of them, the odd the last
    1,
    lambda a, b, c: (a, a + b + c, c),
    lambda a, b, c: (a - b, b, c - b),
    lambda p, q, r, out: (torch.add(p, q, out=out[0]), torch.add(q, r, out=out[1])),
)


def use_winograd(model: nn.Module) -> None:
    """Makes the wide 3 x 3 convolutions of a model compute with fewer products; parameters and their names stay."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _fits(module) and not module.weight.requires_grad:
            module.__class__ = WinogradConv2d


def forget_winograd(model: nn.Module) -> None:
    """Undoes `use_winograd`."""
    for module in model.modules():
        if type(module) is WinogradConv2d:
            module.__class__ = nn.Conv2d
            module.__dict__.pop("kernels", None)


def kernel_bytes(model: nn.Module, within: str) -> int:
    """Bytes that the kernels take beside the weights, of those parts of a model whose name has `within` in it."""
    convs = (conv for name, conv in model.named_modules() if within in name and isinstance(conv, nn.Conv2d))
    return sum(4 * 16 * conv.in_channels * conv.out_channels for conv in convs if _fits(conv))


def _fits(conv: nn.Conv2d) -> bool:
    return (
        (conv.kernel_size, conv.padding, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and (conv.groups, conv.padding_mode) == (1, "zeros")
        and min(conv.in_channels, conv.out_channels) >= WIDE
    )


class WinogradConv2d(nn.Conv2d):
    """x [N, C, H, W] -> [N, O, H, W] by a 3 x 3 kernel; what does not suit is done as in any convolution."""

    def forward(self, x: Tensor) -> Tensor:
        if not suits(x, self.weight, TWO_OF_THREE.step):
            return super().forward(x)
        if "kernels" not in self.__dict__:
            self.__dict__["kernels"] = Kernels(self, TWO_OF_THREE)
        return self.kernels.convolve(x)


def suits(x: Tensor, weight: Tensor, step: int) -> bool:
    """Whether this is a convolution of plain float32 numbers on a CPU, without gradients, and large enough."""
    return (
        linear.suits(x, weight)
        and has_onednn()
        and min(weight.shape[:2]) >= WIDE
        and x[:, 0].numel() >= FEW * step**2
        and not needs_gradients(x, weight)
    )


def version(weight: Tensor) -> tuple[int, int]:
    """Changes when the numbers of a weight do, or the weight is another one."""
    return id(weight), 0 if weight.is_inference() else weight._version


class Kernels:
    """The kernels [O, C] of the products of a convolution with fixed weights, by row and column of a tile."""

    def __init__(self, conv: nn.Conv2d, rule: Filter) -> None:
        self.conv, self.rule = conv, rule
        self.of: tuple[int, int] | None = None
        self.rows: list[list[Tensor]] = []

    def made(self) -> list[list[Tensor]]:
        """They are made again when the weights change."""
        weight = self.conv.weight
        if self.of != version(weight):
            rows = self.rule.of_kernel(*weight.double().unbind(2))
            self.rows = [[_as_read(one) for one in self.rule.of_kernel(*row.unbind(2))] for row in rows]
            self.of = version(weight)
        return self.rows

    def convolve(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, O, H, W], or twice the sides for DOUBLED; the result has its channels innermost."""
        rule, kernels, (count, _, height, width) = self.rule, self.made(), x.shape
        rows, columns = (-(-side // rule.step) for side in (height, width))  # of tiles
        out = x.new_empty(count, rows, 2, columns, 2, len(self.conv.weight))
        band = max(TILES // (count * columns), 1)
        for top in range(0, rows, band):
            part = out[:, top : top + band]
            self._convolve(x, top, part, kernels)
        sides = (2 * height // rule.step, 2 * width // rule.step)
        made = out.view(count, 2 * rows, 2 * columns, -1)[:, : sides[0], : sides[1]].permute(0, 3, 1, 2)
        return made.contiguous(memory_format=torch.channels_last)  # as it is, but for odd sides

    def _convolve(self, x: Tensor, top: int, out: Tensor, kernels: list[list[Tensor]]) -> None:
        """Fills out [N, h, 2, w, 2, O], some rows of tiles, of which `top` is the first."""
        rule, (height, columns) = self.rule, out.shape[1:4:2]
        padded = _padded(x, top * rule.step, height * rule.step + 2, columns, rule.step)
        shape, last, made = (len(x), height, columns, -1), rule.step * (height - 1) + 1, []
        for i, line in enumerate(rule.of_inputs(*(padded[:, i : i + last : rule.step] for i in range(rule.step + 2)))):
            near = (line[:, :, i % rule.step, i // rule.step :][:, :, :columns] for i in range(rule.step + 2))
            products = []
            for j, cell in enumerate(rule.of_inputs(*near)):  # [N, h, w, C]
                bias = self.conv.bias if i == j == 1 else None  # the product that all four outputs have once
                products.append(product(cell.reshape(-1, cell.shape[-1]), kernels[i][j], bias).view(shape))
            made.append(rule.outputs(*products, out=(None, None)))
        for column, parts in enumerate(zip(*made, strict=True)):
            rule.outputs(*parts, out=out[:, :, :, :, column].unbind(2))


def _as_read(kernel: Tensor) -> Tensor:
    """A kernel [O, C] in float32 as products read it, its outputs next to one another."""
    return kernel.t().float().contiguous().t()


def _padded(x: Tensor, first: int, count: int, tiles: int, step: int) -> Tensor:
    """`count` rows of x, padded by a row, from the `first` on: [N, rows, step, columns, C].

    Every `step`-th column lies next to one another, so that what a tile adds up lies as in the tiles beside it.
    """
    pixels, (height, width) = x.permute(0, 2, 3, 1), x.shape[2:]
    padded = x.new_empty(len(x), count, step, tiles + 3 - step, x.shape[1])
    begin, end = max(first - 1, 0), min(first - 1 + count, height)
    above, filled = begin - first + 1, end - begin
    padded[:, :above] = padded[:, above + filled :] = 0
    for parity in range(step):
        skipped = 1 if parity == 0 else 0  # the padding on the left
        own = pixels[:, begin:end, step * skipped + parity - 1 : width : step]
        into = padded[:, above : above + filled, parity]
        into[:, :, skipped : skipped + own.shape[2]] = own
        into[:, :, :skipped] = into[:, :, skipped + own.shape[2] :] = 0
    return padded
