"""Float32 convolutions on a CPU with fewer multiplications (Winograd 1980; Lavin and Gray 2016, arXiv:1509.09308).

Neighbouring outputs share products: along an axis, two outputs of a three-tap kernel take four products instead of
six, and two outputs of an upsampled image take three. In two dimensions: 16 or 9 products instead of 36. The products
of all tiles together are matrix products. The additions before and after about double the rounding errors. In a
convolution over frames each frame is transformed once for all frames of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opensora.acceleration.kernels import linear
from opensora.acceleration.kernels.causal_conv import (
    FoldedCausalConv3d,
    FoldedTime,
    FoldedTimeUpsample,
)
from opensora.acceleration.kernels.linear import (
    MIN_CHANNELS,
    add_product,
    has_onednn,
    mkl_is_faster,
    needs_gradients,
    product,
)
from opensora.acceleration.replace_modules import is_frozen, recast, replace_modules
from opensora.models.vae.vae_temporal import CausalConv3d

MIN_TILES = 192  # below this many 2 x 2 outputs transforming the kernels costs more than it saves
MAX_TILES = 1024  # computed at once

Kinds = tuple[type[nn.Module], ...]
KINDS: Kinds = (nn.Conv2d, CausalConv3d)  # of images, and of frames


class Filter(NamedTuple):
    """A Winograd filter: two outputs along an axis from `step` + 2 inputs a, b, c, ..., one before the tile first."""

    step: int  # from the inputs of one tile to those of the next
    of_kernel: Callable[..., Sequence[Tensor]]  # transforms the three taps
    of_inputs: Callable[..., Sequence[Tensor]]  # transforms the inputs; multiplied with the transformed taps
    inner: Callable[..., tuple[Tensor, Tensor]]  # sums of the inner products; the first and last products are added


TWO_OF_THREE = Filter(  # F(2, 3) of Lavin and Gray
    2,
    lambda a, b, c: (a, (a + b + c) / 2, (a - b + c) / 2, -c),
    lambda a, b, c, d: (a - c, b + c, c - b, b - d),
    lambda q, r: (q + r, q.sub_(r)),
)
UPSAMPLED = Filter(  # inputs a, b, c become a, b, b, c: the even output sees the first three, the odd one the last
    1,
    lambda a, b, c: (a, a + b + c, c),
    lambda a, b, c: (a - b, b, c - b),
    lambda q: (q, q.clone()),
)


def winograd_module(module: nn.Module) -> nn.Module:
    """The Winograd version of a wide frozen 3 x 3 (x 3) convolution; other modules are returned."""
    kind = WINOGRAD_MODULES.get(type(module))
    if kind is None or not _fits(module) or not is_frozen(module):
        return module
    new = recast(module, kind)
    new.transformed = TransformedKernels(module if isinstance(module, nn.Conv2d) else module.conv, TWO_OF_THREE)
    return new


def without_winograd(model: nn.Module, keep: Kinds = ()) -> nn.Module:
    """Undoes `winograd_module` in a model, except for the `keep` kinds of convolutions, and frees their kernels."""

    def plain(module: nn.Module) -> nn.Module:
        kind = PLAIN_MODULES.get(type(module))
        if kind is None or isinstance(module, keep):
            return module
        new = recast(module, kind)
        del new.transformed
        return new

    return replace_modules(model, plain)


def kernel_bytes(model: nn.Module, within: str, kinds: Kinds = KINDS) -> int:
    """Bytes of the transformed kernels of these kinds, in modules whose name contains `within`."""
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
    """Whether a kernel [O, C, (T,) 3, 3] saves more products (~ O x C x T) than it adds sums (~ O + C)."""
    outputs, inputs, *taps = weight.shape[:-2]
    least = 80 if mkl_is_faster() else 64  # MKL's direct convolution is faster, too
    return min(outputs, inputs) >= MIN_CHANNELS and prod(taps) * outputs * inputs >= least * (outputs + inputs)


class WinogradConv2d(nn.Conv2d):
    """x [N, C, H, W] -> [N, O, H, W] by a 3 x 3 kernel; directly where Winograd's algorithm does not suit."""

    transformed: TransformedKernels

    def forward(self, x: Tensor) -> Tensor:
        if not suits(x, self.weight, TWO_OF_THREE.step):
            return super().forward(x)
        return self.transformed.convolve(x)


class WinogradTime(FoldedTime):
    """x [B, C, T, H, W] -> [B, O, T, H, W] by a causal kernel of three frames."""

    transformed: TransformedKernels

    def convolve(self, x: Tensor) -> Tensor:
        if not suits(x, self.conv.weight, TWO_OF_THREE.step):
            return super().convolve(x)
        out = self.transformed.convolve(x.transpose(1, 2).flatten(0, 1), x.shape[2])
        return out.unflatten(0, (len(x), -1)).transpose(1, 2)


class WinogradCausalConv3d(WinogradTime, FoldedCausalConv3d):
    """The Winograd version of a causal convolution."""


class WinogradTimeUpsample(WinogradTime, FoldedTimeUpsample):
    """The Winograd version of the convolution that doubles the frames."""


WINOGRAD_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: WinogradConv2d,
    FoldedCausalConv3d: WinogradCausalConv3d,
    FoldedTimeUpsample: WinogradTimeUpsample,
}
PLAIN_MODULES = {winograd: plain for plain, winograd in WINOGRAD_MODULES.items()}


def suits(x: Tensor, weight: Tensor, step: int) -> bool:
    """Whether the input is plain float32 on a CPU, needs no gradients, and is large enough."""
    return (
        linear.suits(x, weight)
        and has_onednn()
        and min(weight.shape[:2]) >= MIN_CHANNELS
        and x[:, 0].numel() >= MIN_TILES * step**2
        and not needs_gradients(x, weight)
    )


def version(weight: Tensor) -> tuple[int, int]:
    """A value that changes whenever the weight is modified or replaced."""
    return id(weight), 0 if weight.is_inference() else weight._version


class TransformedKernels:
    """Transformed kernels [O, C] of a frozen convolution, by row and column of a tile.

    A convolution over frames has them for each frame of its kernel, the newest first.
    """

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, rule: Filter) -> None:
        self.conv, self.rule = conv, rule
        self.version: tuple[int, int] | None = None
        self.taps: list[list[list[Tensor]]] = []

    def update(self, frames: int) -> list[list[list[Tensor]]]:
        """The kernels for clips of `frames` frames; computed once for each version of the weight."""
        weight = self.conv.weight
        if self.version != version(weight):
            self.taps, self.version = [], version(weight)
        taps = [weight] if weight.ndim == 4 else weight.unbind(2)[::-1]
        self.taps += [self._transform(tap) for tap in taps[len(self.taps) : frames]]
        return self.taps

    def _transform(self, kernel: Tensor) -> list[list[Tensor]]:
        """Transforms a kernel [O, C, 3, 3]; the results are float32, `O` innermost."""
        rows = self.rule.of_kernel(*kernel.permute(2, 3, 1, 0).contiguous().double().unbind(0))
        return [[one.float().t() for one in self.rule.of_kernel(*row.unbind(0))] for row in rows]

    def convolve(self, x: Tensor, frames: int | None = None) -> Tensor:
        """x [N, C, H, W] -> [N, O, H, W] in channels last, or twice the sides for UPSAMPLED.

        With a kernel of several frames, N is clips of `frames` frames (default: one clip), and each sees its past.
        """
        rule, (count, _, height, width) = self.rule, x.shape
        frames = frames or count
        taps = self.update(frames)
        rows, columns = (-(-side // rule.step) for side in (height, width))  # of tiles
        out = x.new_empty(count, rows, 2, columns, 2, len(self.conv.weight))
        band = max(MAX_TILES // (count * columns), 1)
        for top in range(0, rows, band):
            self._convolve(x, top, out[:, top : top + band], taps, frames)
        sides = (2 * height // rule.step, 2 * width // rule.step)
        made = out.view(count, 2 * rows, 2 * columns, -1)[:, : sides[0], : sides[1]].permute(0, 3, 1, 2)
        return made.contiguous(memory_format=torch.channels_last)  # copies odd sides only

    def _convolve(self, x: Tensor, top: int, out: Tensor, taps: list[list[list[Tensor]]], frames: int) -> None:
        """Fills out [N, h, 2, w, 2, O], the rows of tiles from `top` on."""
        rule, (height, columns) = self.rule, out.shape[1:4:2]
        padded = _padded(x, top * rule.step, height * rule.step + 2, columns, rule.step)
        last, made = rule.step * (height - 1) + 1, []
        for i, line in enumerate(rule.of_inputs(*(padded[:, i : i + last : rule.step] for i in range(rule.step + 2)))):
            near = (line[:, :, i % rule.step, i // rule.step :][:, :, :columns] for i in range(rule.step + 2))
            bias = self.conv.bias if i == 1 else None  # this product is in all four outputs exactly once
            made.append(self._columns(rule.of_inputs(*near), [tap[i] for tap in taps], bias, frames))
        for column, (first, *inner, last) in enumerate(zip(*made, strict=True)):
            into = out[:, :, :, :, column]
            for row, (one, other) in enumerate(zip(rule.inner(*inner), (first, last), strict=True)):
                torch.add(one, other, out=into[:, :, row])

    def _columns(
        self, cells: Sequence[Tensor], taps: list[list[Tensor]], bias: Tensor | None, frames: int
    ) -> tuple[Tensor, Tensor]:
        """Both output columns [N, h, w, O] of one line of transformed inputs, cells [N, h, w, C] each."""
        kernels = list(zip(*taps, strict=True))  # of each cell, for all taps
        inner = []
        for cell, of_cell in list(zip(cells, kernels, strict=True))[1:-1]:
            inner.append(_product(cell, of_cell, None if inner else bias, frames))
        columns = self.rule.inner(*inner)
        for column, end in zip(columns, (0, -1), strict=True):
            _add_products(column, cells[end], kernels[end], frames)
        return columns


def _product(cell: Tensor, taps: Sequence[Tensor], bias: Tensor | None, frames: int) -> Tensor:
    """cell [N, h, w, C] -> [N, h, w, O]: the first tap of each frame, plus the other taps of the frames before it."""
    out = product(cell.flatten(0, 2), taps[0], bias).view(*cell.shape[:3], -1)
    _add_products(out, cell, taps, frames, 1)
    return out


def _add_products(out: Tensor, cell: Tensor, taps: Sequence[Tensor], frames: int, first: int = 0) -> None:
    """Adds the products of cell [N, h, w, C] and the taps from `first` on to out [N, h, w, O], frame by frame."""
    for clip, into in zip(cell.split(frames), out.split(frames), strict=True):
        for past in range(first, min(len(taps), frames)):
            add_product(into[past:].flatten(0, 2), clip[: frames - past].flatten(0, 2), taps[past])


def _padded(x: Tensor, first: int, count: int, tiles: int, step: int) -> Tensor:
    """`count` rows, from `first` on, of x padded by one pixel: [N, rows, step, columns, C].

    Every `step`-th column is adjacent in memory, so that equal inputs of neighbouring tiles are contiguous.
    """
    pixels, (height, width) = x.permute(0, 2, 3, 1), x.shape[2:]
    padded = x.new_empty(len(x), count, step, tiles + 3 - step, x.shape[1])
    begin, end = max(first - 1, 0), min(first - 1 + count, height)
    above, filled = begin - first + 1, end - begin
    padded[:, :above] = padded[:, above + filled :] = 0
    for parity in range(step):
        skipped = 1 if parity == 0 else 0  # left padding
        own = pixels[:, begin:end, step * skipped + parity - 1 : width : step]
        into = padded[:, above : above + filled, parity]
        into[:, :, skipped : skipped + own.shape[2]] = own
        into[:, :, :skipped] = into[:, :, skipped + own.shape[2] :] = 0
    return padded
