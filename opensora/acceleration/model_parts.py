"""Facts about any model: its transformer blocks, and the tensors that stay in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import lru_cache

from torch import nn

# Rotary frequencies, positions and latent statistics lose too much in half precision.
KEPT_IN_FLOAT32 = (
    "rope.freqs",
    "*.rope.freqs",
    "pos_embed",
    "pos_embed_temporal",
    "pos_embed_spatial",
    "temp_embed",
    "shift",
    "scale",
)


@lru_cache(maxsize=2**12)
def kept_in_float32(name: str) -> bool:
    """True for a tensor that stays in float32 when a model is cast to half precision."""
    return any(fnmatchcase(name, pattern) for pattern in KEPT_IN_FLOAT32)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer, those of each list (`blocks`, `spatial_blocks`, T5's `block`) in their order."""
    return [block for blocks in _block_lists(model) for block in blocks]


def replace_blocks(model: nn.Module, replacement: Callable[[nn.Module], nn.Module]) -> None:
    """Replaces each block of a transformer by `replacement(block)`."""
    for blocks in list(_block_lists(model)):
        for index, block in enumerate(blocks):
            blocks[index] = replacement(block)


def _block_lists(model: nn.Module) -> Iterator[nn.ModuleList]:
    for name, part in model.named_modules():
        if name.endswith(("block", "blocks")) and isinstance(part, nn.ModuleList):
            yield part
