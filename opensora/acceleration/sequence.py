"""Sequence parallelism by hooks: the ranks of a sequence compute other patches of the same frames.

Tokens [B, T, S, C] are split along S before the first block, padded to equal chunks, and what the final layer makes of
them is joined again. Temporal attention, attention to text and MLPs stay on their rank. Spatial attention is by rows:
an exchange gives each rank some of the B * T frames whole, without padding, and another one brings the tokens back
(as in DSP, Zhao et al. 2024, arXiv:2403.10266); so it runs as it is, whatever its norms, positions and heads.

Every rank of a sequence must compute the same loss of the joined result. The mean over them of the gradients of all
parameters is then the gradient of a single rank: joining multiplies gradients by the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.acceleration.parallel import Layout, blocks_of
from opensora.errors import ConfigError


class _Exchange(torch.autograd.Function):
    """Part p of x [P, ...] goes to rank p; the parts received, by their ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad, ctx.group), None


class _Join(torch.autograd.Function):
    """The x of all ranks, [P, ...]. All ranks differentiate the same loss, so the sum of their gradients is P times."""

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


class _Split:
    """The hooks of a model, and the size of the pass at hand."""

    def __init__(self, layout: Layout) -> None:
        assert layout.mesh is not None
        self.group = layout.mesh["sequence"].get_group()
        self.rank, self.ranks = layout.sequence_rank, layout.sequence_size
        self.size = 0  # S, patches of a frame
        self.rows = 0  # of the attention that runs

    @property
    def chunk(self) -> int:
        """Patches of a frame on each rank."""
        return -(-self.size // self.ranks)

    def enter(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """All tokens [B, T, S, C] -> those of this rank, [B, T, chunk, C]."""
        self.size = args[0].shape[2]
        return (self._pad(args[0], 2).narrow(2, self.rank * self.chunk, self.chunk), *args[1:])

    def leave(self, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """The final layer's output for this rank's tokens -> for all, [B, T, S, F]."""
        return _Join.apply(out, self.group).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : self.size]

    @torch.compiler.disable  # ranks wait for one another: compiled, that may come in another order on each
    def to_rows(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """This rank's patches of all rows, [N, frames * chunk, C] -> its rows whole, [N / P, frames * S, C]."""
        x = args[0]
        self.rows = len(x)
        x = F.pad(x, (0, 0, 0, 0, 0, -len(x) % self.ranks)).unflatten(0, (self.ranks, -1))  # [P, n, frames * chunk, C]
        x = _Exchange.apply(x, self.group).unflatten(2, (-1, self.chunk))  # [P, n, frames, chunk, C]
        x = x.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : self.size]
        return (x.flatten(1, 2), *args[1:])

    @torch.compiler.disable
    def to_patches(self, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """The way back, for what the attention has made of them."""
        x = self._pad(out.unflatten(1, (-1, self.size)), 2).unflatten(2, (self.ranks, -1))  # [n, frames, P, chunk, C]
        x = _Exchange.apply(x.permute(2, 0, 1, 3, 4), self.group)
        return x.flatten(0, 1).flatten(1, 2)[: self.rows]

    def _pad(self, x: Tensor, axis: int) -> Tensor:
        return F.pad(x, (*(0, 0) * (x.ndim - 1 - axis), 0, self.chunk * self.ranks - self.size))


def check_divisible(model: nn.Module, layout: Layout) -> None:
    """Raises ConfigError for a model whose tokens cannot be split over the ranks of a sequence."""
    if layout.sequence_size == 1:
        return
    blocks = blocks_of(model)
    if not blocks or not hasattr(model, "final_layer") or not all(hasattr(b, "axis") for b in blocks):
        name = type(model).__name__
        raise ConfigError(f"{name} cannot be split over ranks; STDiT, STDiT2, STDiT3, PixArt, DiT and Latte can")


def sequence_parallel(model: nn.Module, layout: Layout) -> None:
    """Splits the tokens of a transformer over the ranks of its sequence; nothing is done for one rank.

    A pass and its backward must end before a pass of another size begins. Raises ConfigError for other models.
    """
    check_divisible(model, layout)
    if layout.sequence_size == 1:
        return
    split, blocks = _Split(layout), blocks_of(model)
    blocks[0].register_forward_pre_hook(split.enter)
    model.final_layer.register_forward_hook(split.leave)
    for block in blocks:
        if block.axis != "time":
            block.attn.register_forward_pre_hook(split.to_rows)
            block.attn.register_forward_hook(split.to_patches)
