"""Convolutions of float32 on a CPU with fewer products (Winograd 1980; Lavin and Gray 2016, arXiv:1509.09308).

Outputs that lie side by side share products: along an axis, two of a kernel of three taps need four products instead
of six, and two of an image that is doubled first need three. An image has two axes: 16 products or 9 instead of 36.
The products of all places together are products of matrices. What is added before and after about doubles the rounding
errors of a direct sum. In a convolution over frames, too, each frame is added up once before, and once after, for all
frames of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opensora.acceleration.kernels import linear
from opensora.acceleration.kernels.linear import (
    WIDE,
    add_product,
    has_onednn,
    mkl_is_faster,
    needs_gradients,
    product,
)
from opensora.models.vae.vae_temporal import CausalConv3d

FEW = 192  # tiles of two by two outputs that are not worth making kernels for
TILES = 1024  # that are computed at once

Kinds = tuple[type[nn.Module], ...]
KINDS: Kinds = (nn.Conv2d, CausalConv3d)  # of images, and of frames


class Filter(NamedTuple):
    """Two outputs along an axis from `step` + 2 inputs a, b, c, ..., which begin one before the tile."""

    step: int  # from the inputs of one tile to those of the next
    of_kernel: Callable[..., Sequence[Tensor]]  # its three taps, as what is multiplied
    of_inputs: Callable[..., Sequence[Tensor]]  # by this
    inner: Callable[..., tuple[Tensor, Tensor]]  # what the first product is added to, and the last, of those between


TWO_OF_THREE = Filter(  # Lavin and Gray, F(2, 3)
    2,
    lambda a, b, c: (a, (a + b + c) / 2, (a - b + c) / 2, -c),
    lambda a, b, c, d: (a - c, b + c, c - b, b - d),
    lambda q, r: (q + r, q.sub_(r)),
)
DOUBLED = Filter(  # inputs a, b, c become a, b, b, c: the even output sees the first three of them, the odd the last
    1,
    lambda a, b, c: (a, a + b + c, c),
    lambda a, b, c: (a - b, b, c - b),
    lambda q: (q, q.clone()),
)


def use_winograd(model: nn.Module) -> None:
    """Makes the wide 3 x 3 convolutions of a model compute with fewer products; parameters and their names stay."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _fits(module) and not module.weight.requires_grad:
            module.__class__ = WinogradConv2d
        elif isinstance(module, CausalConv3d) and _fits(module) and not module.conv.weight.requires_grad:
            module.folded = OfFrames(module)


def forget_winograd(model: nn.Module, but: Kinds = ()) -> None:
    """Undoes `use_winograd`, but for these kinds of convolutions."""
    for module in model.modules():
        if isinstance(module, but):
            continue
        if type(module) is WinogradConv2d:
            module.__class__ = nn.Conv2d
            module.__dict__.pop("kernels", None)
        elif isinstance(module, CausalConv3d):
            module.__dict__.pop("folded", None)


def kernel_bytes(model: nn.Module, within: str, kinds: Kinds = KINDS) -> int:
    """Bytes that the kernels of these kinds take beside the weights, in parts whose name has `within` in it."""
    parts = [part for name, part in model.named_modules() if within in name and isinstance(part, kinds) and _fits(part)]
    weights = [part.weight if isinstance(part, nn.Conv2d) else part.conv.weight for part in parts]
    return sum(4 * 16 * weight.numel() // 9 for weight in weights)


def _fits(module: nn.Module) -> bool:
    if isinstance(module, CausalConv3d):
        return (module.kernel, module.time_stride) == (3, 1) and _pays(module.conv.weight)
    return (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.padding, module.stride, module.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and (module.groups, module.padding_mode) == (1, "zeros")
        and _pays(module.weight)
    )


def _pays(weight: Tensor) -> bool:
    """Whether the products that a kernel [O, C, (T,) 3, 3] saves outweigh the sums; they are as O x C x T to O + C."""
    outputs, inputs, *taps = weight.shape[:-2]
    least = 80 if mkl_is_faster() else 64  # on processors of its maker the direct way is faster, too
    return min(outputs, inputs) >= WIDE and prod(taps) * outputs * inputs >= least * (outputs + inputs)


class WinogradConv2d(nn.Conv2d):
    """x [N, C, H, W] -> [N, O, H, W] by a 3 x 3 kernel; what does not suit is done as in any convolution."""

    def forward(self, x: Tensor) -> Tensor:
        if not suits(x, self.weight, TWO_OF_THREE.step):
            return super().forward(x)
        if "kernels" not in self.__dict__:
            self.__dict__["kernels"] = Kernels(self, TWO_OF_THREE)
        return self.kernels.convolve(x)


class OfFrames:
    """x [B, C, T, H, W] -> [B, O, T, H, W] by a kernel of three frames, which sees the past."""

    def __init__(self, module: CausalConv3d) -> None:
        self.module, self.kernels = module, Kernels(module.conv, TWO_OF_THREE)

    def __call__(self, x: Tensor) -> Tensor:
        if not suits(x, self.module.conv.weight, TWO_OF_THREE.step):
            return type(self.module).folded(self.module, x)
        out = self.kernels.convolve(x.transpose(1, 2).flatten(0, 1), x.shape[2])
        return out.unflatten(0, (len(x), -1)).transpose(1, 2)


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
    """The kernels [O, C] of the products of a convolution with fixed weights, by row and column of a tile.

    A convolution over frames has them for each frame of its kernel, the newest first.
    """

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, rule: Filter) -> None:
        self.conv, self.rule = conv, rule
        self.of: tuple[int, int] | None = None
        self.taps: list[list[list[Tensor]]] = []

    def made(self, frames: int) -> list[list[list[Tensor]]]:
        """Those for clips of so many frames; they are made once, and again when the weights change."""
        weight = self.conv.weight
        if self.of != version(weight):
            self.taps, self.of = [], version(weight)
        taps = [weight] if weight.ndim == 4 else weight.unbind(2)[::-1]
        self.taps += [self._of_tap(tap) for tap in taps[len(self.taps) : frames]]
        return self.taps

    def _of_tap(self, kernel: Tensor) -> list[list[Tensor]]:
        """Those of a kernel [O, C, 3, 3] in float32 as products read them, their outputs next to one another."""
        rows = self.rule.of_kernel(*kernel.permute(2, 3, 1, 0).contiguous().double().unbind(0))
        return [[one.float().t() for one in self.rule.of_kernel(*row.unbind(0))] for row in rows]

    def convolve(self, x: Tensor, frames: int | None = None) -> Tensor:
        """x [N, C, H, W] -> [N, O, H, W], or twice the sides for DOUBLED; the result has its channels innermost.

        If the kernel has several frames, each of the `frames` of a clip (all, if not given) sees those before it.
        """
        rule, (count, _, height, width) = self.rule, x.shape
        frames = frames or count
        taps = self.made(frames)
        rows, columns = (-(-side // rule.step) for side in (height, width))  # of tiles
        out = x.new_empty(count, rows, 2, columns, 2, len(self.conv.weight))
        band = max(TILES // (count * columns), 1)
        for top in range(0, rows, band):
            self._convolve(x, top, out[:, top : top + band], taps, frames)
        sides = (2 * height // rule.step, 2 * width // rule.step)
        made = out.view(count, 2 * rows, 2 * columns, -1)[:, : sides[0], : sides[1]].permute(0, 3, 1, 2)
        return made.contiguous(memory_format=torch.channels_last)  # as it is, but for odd sides

    def _convolve(self, x: Tensor, top: int, out: Tensor, taps: list[list[list[Tensor]]], frames: int) -> None:
        """Fills out [N, h, 2, w, 2, O], some rows of tiles, of which `top` is the first."""
        rule, (height, columns) = self.rule, out.shape[1:4:2]
        padded = _padded(x, top * rule.step, height * rule.step + 2, columns, rule.step)
        last, made = rule.step * (height - 1) + 1, []
        for i, line in enumerate(rule.of_inputs(*(padded[:, i : i + last : rule.step] for i in range(rule.step + 2)))):
            near = (line[:, :, i % rule.step, i // rule.step :][:, :, :columns] for i in range(rule.step + 2))
            bias = self.conv.bias if i == 1 else None  # goes to the product that all four outputs have once
            made.append(self._columns(rule.of_inputs(*near), [tap[i] for tap in taps], bias, frames))
        for column, (first, *inner, last) in enumerate(zip(*made, strict=True)):
            into = out[:, :, :, :, column]
            for row, (one, other) in enumerate(zip(rule.inner(*inner), (first, last), strict=True)):
                torch.add(one, other, out=into[:, :, row])

    def _columns(
        self, cells: Sequence[Tensor], taps: list[list[Tensor]], bias: Tensor | None, frames: int
    ) -> tuple[Tensor, Tensor]:
        """The two columns [N, h, w, O] of tiles of which cells [N, h, w, C] are one line, multiplied by its kernels."""
        kernels = list(zip(*taps, strict=True))  # of each cell, for all taps
        inner = []
        for cell, of_cell in list(zip(cells, kernels, strict=True))[1:-1]:
            inner.append(_product(cell, of_cell, None if inner else bias, frames))
        columns = self.rule.inner(*inner)
        for column, end in zip(columns, (0, -1), strict=True):
            _add_products(column, cells[end], kernels[end], frames)
        return columns


def _product(cell: Tensor, taps: Sequence[Tensor], bias: Tensor | None, frames: int) -> Tensor:
    """cell [N, h, w, C] -> [N, h, w, O], by the first of the taps; what the others give goes to the frames after it."""
    out = product(cell.flatten(0, 2), taps[0], bias).view(*cell.shape[:3], -1)
    _add_products(out, cell, taps, frames, 1)
    return out


def _add_products(out: Tensor, cell: Tensor, taps: Sequence[Tensor], frames: int, first: int = 0) -> None:
    """Adds to out [N, h, w, O] what the taps from the `first` on give of cell [N, h, w, C]."""
    for clip, into in zip(cell.split(frames), out.split(frames), strict=True):
        for past in range(first, min(len(taps), frames)):
            add_product(into[past:].flatten(0, 2), clip[: frames - past].flatten(0, 2), taps[past])


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
