"""Prepares a model for training on one or more ranks."""

from __future__ import annotations

import torch
from torch import nn

from opensora.acceleration.activation_checkpointing import checkpoint_blocks
from opensora.acceleration.compile import compile_blocks
from opensora.distributed.fsdp import shard
from opensora.distributed.process_group import RankLayout
from opensora.distributed.sequence_parallel import sequence_parallel


def parallelize(
    model: nn.Module, layout: RankLayout, dtype: torch.dtype, grad_checkpoint: bool = False, compile: bool = False
) -> None:
    """Activation checkpointing, sequence parallelism, compilation, FSDP: each wraps those before it.

    Create the optimizer afterwards: FSDP replaces parameters. Names in the state dict stay.
    """
    if grad_checkpoint:
        checkpoint_blocks(model)
    sequence_parallel(model, layout)
    if compile:
        compile_blocks(model)
    shard(model, layout, dtype)
