"""Facts about any model: its transformer blocks, and the tensors that stay in float32."""

from __future__ import annotations

from fnmatch import fnmatchcase

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


def kept_in_float32(name: str) -> bool:
    """True for a tensor that stays in float32 when a model is cast to half precision."""
    return any(fnmatchcase(name, pattern) for pattern in KEPT_IN_FLOAT32)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer, those of each list (`blocks`, `spatial_blocks`, T5's `block`) in their order."""
    lists = (part for name, part in model.named_modules() if name.endswith(("block", "blocks")))
    return [block for part in lists if isinstance(part, nn.ModuleList) for block in part]
