"""Latte (Ma et al. 2024, arXiv:2401.03048): DiT whose blocks attend along space and time in turn."""

from __future__ import annotations

from opensora.models.dit.dit import DiT
from opensora.models.layers.blocks import Axis


class Latte(DiT):
    """DiT with spatial blocks at even and temporal ones at odd places; no_temporal_pos_emb has no effect."""

    def axis(self, index: int) -> Axis:
        return "time" if index % 2 else "space"

    def adds_frame_positions(self, index: int) -> bool:
        return index == 1
