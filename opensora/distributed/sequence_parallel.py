"""Sequence parallelism by hooks: the ranks of a sequence compute other patches of the same frames.

Halves of guidance on two groups of ranks: each group is then a sequence for its half (`guidance_parallel`).

Tokens [B, T, S, C] are split along S before the first block, padded to equal chunks, and what the final layer makes of
them is joined again. Temporal attention, attention to text and MLPs stay on their rank. Spatial attention is by rows:
an exchange gives each rank some of the B * T frames whole, without padding, and another one brings the tokens back
(as in DSP, Zhao et al. 2024, arXiv:2403.10266); so it runs as it is, whatever its norms, positions and heads.

Every rank of a sequence must compute the same loss of the joined result. The mean over them of the gradients of all
parameters is then the gradient of a single rank: joining multiplies gradients by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.acceleration.model_parts import blocks_of
from opensora.distributed.fsdp import Layout, start
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
        self.size = 0  # S, patches of a frame
        self.rows = 0  # of the attention that runs
        self._over(layout)

    def _over(self, layout: Layout) -> None:
        assert layout.mesh is not None
        self.layout, self.group = layout, layout.mesh["sequence"].get_group()
        self.rank, self.ranks = layout.sequence_rank, layout.sequence_size

    @contextmanager
    def over(self, layout: Layout) -> Iterator[None]:
        """Splits over the sequences of another layout in the meantime."""
        before = self.layout
        self._over(layout)
        try:
            yield
        finally:
            self._over(before)

    @property
    def chunk(self) -> int:
        """Patches of a frame on each rank."""
        return -(-self.size // self.ranks)

    def enter(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """All tokens [B, T, S, C] -> those of this rank, [B, T, chunk, C]."""
        if self.ranks == 1:
            return args
        self.size = args[0].shape[2]
        return (self._pad(args[0], 2).narrow(2, self.rank * self.chunk, self.chunk), *args[1:])

    def leave(self, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """The final layer's output for this rank's tokens -> for all, [B, T, S, F]."""
        if self.ranks == 1:
            return out
        return _Join.apply(out, self.group).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : self.size]

    @torch.compiler.disable  # ranks wait for one another: compiled, that may come in another order on each
    def to_rows(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """This rank's patches of all rows, [N, frames * chunk, C] -> its rows whole, [N / P, frames * S, C]."""
        if self.ranks == 1:
            return args
        x = args[0]
        self.rows = len(x)
        x = F.pad(x, (0, 0, 0, 0, 0, -len(x) % self.ranks)).unflatten(0, (self.ranks, -1))  # [P, n, frames * chunk, C]
        x = _Exchange.apply(x, self.group).unflatten(2, (-1, self.chunk))  # [P, n, frames, chunk, C]
        x = x.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : self.size]
        return (x.flatten(1, 2), *args[1:])

    @torch.compiler.disable
    def to_patches(self, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """The way back, for what the attention has made of them."""
        if self.ranks == 1:
            return out
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


def sequence_parallel(model: nn.Module, layout: Layout) -> _Split | None:
    """Splits the tokens of a transformer over the ranks of its sequence; nothing is done for one rank.

    A pass and its backward must end before a pass of another size begins. Returns the hooks. Raises ConfigError for
    other models.
    """
    check_divisible(model, layout)
    if layout.sequence_size == 1:
        return None
    split, blocks = _Split(layout), blocks_of(model)
    blocks[0].register_forward_pre_hook(split.enter)
    model.final_layer.register_forward_hook(split.leave)
    for block in blocks:
        if block.axis != "time":
            block.attn.register_forward_pre_hook(split.to_rows)
            block.attn.register_forward_hook(split.to_patches)
    return split


def check_guidance_ranks(how: str, layout: Layout) -> None:
    """Raises ConfigError where the halves of guidance are to be apart, but the ranks do not make two groups."""
    if how == "apart" and layout.sequence_size % 2:
        ranks = layout.sequence_size
        raise ConfigError(f"guidance_ranks 'apart' needs an even number of ranks, not {ranks}; use auto or together")


def guidance_parallel(model: nn.Module, layout: Layout, how: str = "auto", batch: int = 1) -> Any:
    """A model for inference over all ranks of a sequence, each half of which computes one half of guidance.

    It is called as the model is, on `batch` samples or on both halves of them, and gives the same on every rank. Two
    groups of P / 2 exchange less than one of P: of the tokens that the ranks of a group hold, each sends 1 - 2 / P
    instead of 1 - 1 / P, and then once what the model predicts. `how` is "together" (each sequence over all ranks),
    "apart", or "auto": apart wherever the ranks make two groups and the halves are computed in one batch. Where only
    one half is asked for, all ranks work on it. Raises ConfigError for models that cannot be split.
    """
    check_guidance_ranks(how, layout)
    split = sequence_parallel(model, layout)
    if split is None or how == "together" or layout.sequence_size % 2:
        return model
    assert layout.mesh is not None
    groups = start(torch.device(layout.mesh.device_type), layout.sequence_size // 2)
    return _Halves(model, split, groups, batch)


class _Halves:
    """A model that gets both halves of guidance as one batch, and computes that of its group of ranks.

    `groups` lays out the ranks of an inference by halves: its data rank 0 computes the first half, 1 the second.
    """

    def __init__(self, model: nn.Module, split: _Split, groups: Layout, batch: int) -> None:
        assert groups.mesh is not None
        self.model, self.split, self.groups, self.batch = model, split, groups, batch
        self.partners = groups.mesh["data"].get_group()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def prepare(self, shape: Sequence[int], **arguments: Any) -> dict[str, Any]:
        """What the model makes of its arguments; of both halves of them, only this group's are prepared."""
        if shape[0] != 2 * self.batch:
            return self.model.prepare(shape, **arguments)
        return {"half": self.model.prepare((self.batch, *shape[1:]), **self._mine(arguments))}

    def __call__(self, x: Tensor, timestep: Tensor, half: Mapping[str, Any] | None = None, **others: Any) -> Tensor:
        """The predictions for x; for both halves, [2 B, ...], where their arguments are `half`."""
        if half is None:
            return self.model(x, timestep, **others)
        number = self.groups.data_rank
        with self.split.over(self.groups):
            times = timestep if len(timestep) == 1 else timestep.chunk(2)[number]
            out = self.model(x.chunk(2)[number], times, **half, **self._mine(others))
        return _Join.apply(out, self.partners).flatten(0, 1)

    def _mine(self, both: Mapping[str, Any]) -> dict[str, Any]:
        """This group's half of all tensors that have rows; a single row serves both."""
        number = self.groups.data_rank
        halved = {n for n, v in both.items() if isinstance(v, Tensor) and v.ndim and len(v) > 1}
        return {n: v.chunk(2)[number] if n in halved else v for n, v in both.items()}
