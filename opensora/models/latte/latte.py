"""Latte (Ma et al. 2024, arXiv:2401.03048): DiT whose blocks attend along space and time in turn."""

from __future__ import annotations

from typing import Any

from opensora.models.dit.dit import DiT
from opensora.models.layers.blocks import Axis


class Latte(DiT):
    """DiT with spatial blocks at even and temporal ones at odd places; no_temporal_pos_emb has no effect."""

    def axis(self, index: int) -> Axis:
        return "time" if index % 2 else "space"

    def adds_frame_positions(self, index: int) -> bool:
        return index == 1


def Latte_XL_2(**kwargs: Any) -> Latte:
    """The published size: hidden 1152, 16 heads, 28 blocks."""
    return Latte(**{"depth": 28, "hidden_size": 1152, "patch_size": (1, 2, 2), "num_heads": 16, **kwargs})


def Latte_XL_2x2(**kwargs: Any) -> Latte:
    """Latte-XL with patches of two frames."""
    return Latte_XL_2(**{"patch_size": (2, 2, 2), **kwargs})
