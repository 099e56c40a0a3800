"""Activation checkpointing: a block's activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from opensora.acceleration.model_parts import blocks_of


def checkpoint_blocks(model: nn.Module) -> None:
    """Keeps only the input of each block for the backward pass (Chen et al. 2016); the numbers stay the same.

    Blocks draw no random numbers, so no state of a generator is kept.
    """
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
