"""Compilation of transformer blocks (torch.compile)."""

from __future__ import annotations

from torch import nn

from opensora.acceleration.model_parts import blocks_of


def compile_blocks(model: nn.Module) -> None:
    """Compiles each transformer block in place, for inputs of any size. Blocks of one kind share their code."""
    for block in blocks_of(model):
        block.compile(dynamic=True)
