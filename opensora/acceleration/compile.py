"""Compilation of transformer blocks (torch.compile)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from opensora.acceleration.model_parts import blocks_of

# Graphs of one kind of block. Sizes are symbolic, but for 1: batches of one or more, clips of one frame or more, with
# and without given frames, make eight, and training and validation have their own. Beyond PyTorch's limit of eight it
# runs blocks uncompiled.
MOST_GRAPHS = 64


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles each transformer block in place, for inputs of any size. Blocks of one kind share their code."""
    import torch._dynamo.config as limits  # takes seconds

    limits.recompile_limit = max(limits.recompile_limit, MOST_GRAPHS)
    for block in blocks_of(model):
        block.compile(backend=backend, dynamic=True)
