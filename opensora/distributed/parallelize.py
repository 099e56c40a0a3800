"""A model made ready for a run on one rank or many, from outside and in a fixed order."""

from __future__ import annotations

import torch
from torch import nn

from opensora.acceleration.activation_checkpointing import checkpoint_blocks
from opensora.acceleration.model_parts import blocks_of
from opensora.distributed.fsdp import Layout, shard
from opensora.distributed.sequence_parallel import sequence_parallel


def parallelize(
    model: nn.Module, layout: Layout, dtype: torch.dtype, grad_checkpoint: bool = False, compile: bool = False
) -> None:
    """Checkpointing, then the split over a sequence, then compilation, then sharding: each works on those before it.

    The optimizer is made afterwards: sharding replaces parameters. Names in the state dict stay as they are.
    """
    if grad_checkpoint:
        checkpoint_blocks(model)
    sequence_parallel(model, layout)
    if compile:
        compile_blocks(model)
    shard(model, layout, dtype)


def compile_blocks(model: nn.Module) -> None:
    """Compiles the blocks of a transformer, each kind once, for any size; the hooks of blocks stay outside."""
    for block in blocks_of(model):
        block.forward = torch.compile(block.forward, dynamic=True)
