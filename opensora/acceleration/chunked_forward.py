"""Chunked forward passes: attentions and MLPs of transformer blocks take a bounded number of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from opensora.acceleration.model_parts import blocks_of
from opensora.acceleration.replace_modules import ModuleWrapper
from opensora.models.layers.attention import CrossAttention


def chunk_blocks(model: nn.Module, tokens: int) -> None:
    """Runs the parts of each transformer block in chunks of at most `tokens` tokens, if one sequence is not longer.

    Self-attention is split between sequences, cross-attention and MLPs between tokens. The result is the same.
    """
    for block in blocks_of(model):
        for name, module in list(block.named_children()):
            if name in CHUNKED_MODULES:
                block.register_module(name, CHUNKED_MODULES[name](module, tokens))


class ChunkedModule(ModuleWrapper):
    """Base of modules that pass `tokens` tokens at a time to `wrapped`."""

    def __init__(self, module: nn.Module, tokens: int) -> None:
        super().__init__(module)
        self.tokens = tokens


class ChunkedSelfAttention(ChunkedModule):
    """Sequences in chunks: the rows of x [N, L, C]; the columns S of x [B, T, S, C]."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return chunked(lambda part: self.wrapped(part, *args), x, axis=2 if x.ndim == 4 else 0, tokens=self.tokens)


class ChunkedCrossAttention(ChunkedModule):
    """Tokens of x [B, N, C] in chunks; keys and values of the text are computed once."""

    wrapped: CrossAttention

    def forward(self, x: Tensor, y: Any, keep: Tensor | None = None) -> Tensor:
        y = self.wrapped.read(y) if isinstance(y, Tensor) else y
        return chunked(lambda part: self.wrapped(part, y, keep), x, axis=1, tokens=self.tokens)


class ChunkedMlp(ChunkedModule):
    """Tokens of x [..., C] in chunks."""

    def forward(self, x: Tensor) -> Tensor:
        return chunked(self.wrapped, x.flatten(0, -2), axis=0, tokens=self.tokens).view(x.shape)


CHUNKED_MODULES: dict[str, type[ChunkedModule]] = {  # by the name of a block's child
    "attn": ChunkedSelfAttention,
    "attn_temp": ChunkedSelfAttention,
    "cross_attn": ChunkedCrossAttention,
    "mlp": ChunkedMlp,
}


def chunked(function: Callable[[Tensor], Tensor], x: Tensor, axis: int, tokens: int) -> Tensor:
    """`function(x)`, of the shape of x, computed in chunks of at most `tokens` tokens along an axis.

    A `TorchFunctionMode` can override it, as it can override torch's functions.
    """
    if has_torch_function((x,)):
        return handle_torch_function(chunked, (x,), function, x, axis, tokens)
    step = chunk_length(x, axis, tokens)
    if step >= x.shape[axis]:
        return function(x)
    out = torch.empty_like(x)
    for part, target in zip(x.split(step, axis), out.split(step, axis), strict=True):
        target.copy_(function(part))
    return out


def chunk_length(x: Tensor, axis: int, tokens: int) -> int:
    """The length along an axis of chunks of at most `tokens` tokens; at least 1."""
    return max(tokens * x.shape[axis] // (x.numel() // x.shape[-1]), 1)
