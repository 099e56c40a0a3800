"""LoRA files for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from opensora.checkpoints.lora import write_lora
from opensora.models.lora import LoRALayer, LoRAWeights


def embedded_lora(path: Path) -> None:
    """A random adapter of two layers of the embedded model."""
    layers = {
        f"spatial_blocks.{i}.attn.qkv": LoRALayer(torch.randn(4, 256) / 16, torch.randn(768, 4) / 64, 4.0)
        for i in range(2)
    }
    write_lora(path, LoRAWeights(layers))
