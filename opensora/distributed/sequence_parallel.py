"""Sequence parallelism (DSP, Zhao et al. 2024, arXiv:2403.10266): ranks share the patches of each frame.

Hooks scatter the tokens [B, T, S, C] along S before the first block, padded to equal chunks, and gather the output of
the final layer. Temporal attention, cross-attention and MLPs work on the tokens of one rank. Spatial attention needs
whole frames: an all-to-all gives each rank some of the B * T frames without padding, and a second one brings the tokens
back. The attention itself runs unchanged, whatever its norms, positions and heads.

Every rank of a sequence must compute the same loss of the gathered output. The gather multiplies gradients by the
number of ranks, so that their mean over the ranks is the gradient of a single rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.acceleration.model_parts import blocks_of
from opensora.distributed.process_group import RankLayout
from opensora.errors import ConfigError


class AllToAll(torch.autograd.Function):
    """Sends part p of x [P, ...] to rank p; returns the received parts in the order of their ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return AllToAll.apply(grad, ctx.group), None


class AllGather(torch.autograd.Function):
    """The x of all ranks, [P, ...]. All ranks differentiate the same loss: its gradient is multiplied by P."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[dist.get_rank(ctx.group)] * len(grad), None


class SequenceSplit:
    """The hooks of a model, and the sizes of the current forward pass."""

    def __init__(self, layout: RankLayout) -> None:
        self.size = 0  # S, patches of a frame
        self.rows = 0  # sequences of the current attention
        self._use(layout)

    def _use(self, layout: RankLayout) -> None:
        assert layout.mesh is not None
        self.layout, self.group = layout, layout.mesh["sequence"].get_group()
        self.rank, self.ranks = layout.sequence_rank, layout.sequence_size

    @contextmanager
    def using(self, layout: RankLayout) -> Iterator[None]:
        """Within it, tokens are split over the sequences of another layout."""
        before = self.layout
        self._use(layout)
        try:
            yield
        finally:
            self._use(before)

    @property
    def chunk(self) -> int:
        """Patches of a frame on each rank."""
        return -(-self.size // self.ranks)

    def scatter(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Scatters all tokens [B, T, S, C] -> this rank's, [B, T, chunk, C]."""
        if self.ranks == 1:
            return args
        self.size = args[0].shape[2]
        return (self._pad(args[0], 2).narrow(2, self.rank * self.chunk, self.chunk), *args[1:])

    def gather(self, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Gathers the final layer's output for this rank's tokens -> for all, [B, T, S, F]."""
        if self.ranks == 1:
            return out
        return AllGather.apply(out, self.group).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : self.size]

    def to_rows(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """This rank's patches of all rows [N, frames * chunk, C] -> all patches of its rows [N / P, frames * S, C]."""
        if self.ranks == 1:
            return args
        x = args[0]
        self.rows = len(x)
        x = F.pad(x, (0, 0, 0, 0, 0, -len(x) % self.ranks)).unflatten(0, (self.ranks, -1))  # [P, n, frames * chunk, C]
        x = AllToAll.apply(x, self.group).unflatten(2, (-1, self.chunk))  # [P, n, frames, chunk, C]
        x = x.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : self.size]
        return (x.flatten(1, 2), *args[1:])

    def to_patches(self, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """The attention's output for this rank's rows -> its patches of all rows; the inverse of `to_rows`."""
        if self.ranks == 1:
            return out
        x = self._pad(out.unflatten(1, (-1, self.size)), 2).unflatten(2, (self.ranks, -1))  # [n, frames, P, chunk, C]
        x = AllToAll.apply(x.permute(2, 0, 1, 3, 4), self.group)
        return x.flatten(0, 1).flatten(1, 2)[: self.rows]

    def _pad(self, x: Tensor, axis: int) -> Tensor:
        return F.pad(x, (*(0, 0) * (x.ndim - 1 - axis), 0, self.chunk * self.ranks - self.size))


def check_divisible(model: nn.Module, layout: RankLayout) -> None:
    """Raises ConfigError if the tokens of a model cannot be split over ranks."""
    if layout.sequence_size == 1:
        return
    blocks = blocks_of(model)
    if not blocks or not hasattr(model, "final_layer") or not all(hasattr(b, "axis") for b in blocks):
        name = type(model).__name__
        raise ConfigError(f"{name} cannot be split over ranks; STDiT, STDiT2, STDiT3, PixArt, DiT and Latte can")


def sequence_parallel(model: nn.Module, layout: RankLayout) -> SequenceSplit | None:
    """Registers hooks that split the tokens of a transformer over the ranks of its sequence; None for one rank.

    Finish a forward and its backward pass before another size begins. Raises ConfigError for models that cannot be
    split.
    """
    check_divisible(model, layout)
    if layout.sequence_size == 1:
        return None
    split, blocks = SequenceSplit(layout), blocks_of(model)
    blocks[0].register_forward_pre_hook(split.scatter)
    model.get_submodule("final_layer").register_forward_hook(split.gather)
    for block in blocks:
        if block.axis != "time":  # compiled, collectives may be issued in another order on each rank
            block.get_submodule("attn").register_forward_pre_hook(torch.compiler.disable(split.to_rows))
            block.get_submodule("attn").register_forward_hook(torch.compiler.disable(split.to_patches))
    return split
