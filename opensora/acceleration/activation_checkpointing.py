"""Activation checkpointing: a block's activations are recomputed in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from opensora.acceleration.model_parts import replace_blocks
from opensora.acceleration.replace_modules import ModuleWrapper


class CheckpointedModule(ModuleWrapper):
    """Keeps only the inputs of `wrapped` for the backward pass; the result is the same.

    The modules draw no random numbers, so no generator state is kept.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.wrapped, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def checkpoint_blocks(model: nn.Module) -> None:
    """Checkpoints the activations of every transformer block of `model`."""
    replace_blocks(model, CheckpointedModule)
