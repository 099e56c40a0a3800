"""STDiT, the diffusion transformer of Open-Sora 1.0: PixArt blocks with attention over time (Zheng et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opensora.models.layers.arguments import arguments_of
from opensora.models.layers.attention import Pair, SelfAttention
from opensora.models.layers.blocks import Modulation, TextBlock, along, rows_of
from opensora.models.layers.embeddings import Size3
from opensora.models.layers.fixed_positions import FixedPositions
from opensora.models.layers.transformer import StaticInputs, TextTransformer


class STDiTBlock(TextBlock):
    """A spatial block whose input gets temporal self-attention, unmodulated, before the text."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__(dim, SelfAttention(dim, num_heads), mlp_ratio, "space")
        self.attn_temp = SelfAttention(dim, num_heads)

    def forward(
        self,
        x: Tensor,
        modulation: Modulation,
        y: Tensor | Pair,
        text_mask: Tensor | None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """`positions` [1, T, 1, C] of the frames or None; given frames use the gate of generated ones."""
        rows = rows_of(self.scale_shift_table + modulation.blocks)
        x = self.self_attend(x, rows)
        gate = rows_of(self.scale_shift_table + modulation.generated)[2]
        x = torch.addcmul(x, gate, along("time", self.attn_temp, x if positions is None else x + positions))
        return self.feed_forward(self.attend_text(x, y, text_mask), rows)


class STDiT(FixedPositions, TextTransformer):
    """Predicts noise and variance of a latent video of the size it was built for.

    Args: input_size: latent (T, H, W); space_scale, time_scale: positions are divided by them; freeze: "not_temporal"
    or "text"; no_temporal_pos_emb has no effect; the rest as for STDiT3.
    """

    def __init__(
        self, input_size: Size3 = (1, 32, 32), in_channels: int = 4, patch_size: Size3 = (1, 2, 2),
        hidden_size: int = 1152, depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1, pred_sigma: bool = True, drop_path: float = 0.0,
        no_temporal_pos_emb: bool = False, caption_channels: int = 4096, model_max_length: int = 120,
        space_scale: float = 1.0, time_scale: float = 1.0, freeze: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(arguments_of(locals()))
        self.blocks = nn.ModuleList(STDiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.register_positions()
        self.initialize()
        self.freeze(freeze, temporal=("attn_temp",))

    def _initialize(self) -> None:
        """New temporal attention starts at zero effect."""
        super()._initialize()
        for block in self.blocks:
            nn.init.zeros_(block.attn_temp.proj.weight)

    def positions(self) -> dict[str, Tensor]:
        return {
            "pos_embed": self.grid_positions(self.config["space_scale"]),
            "pos_embed_temporal": self.frame_positions(self.config["time_scale"]),
        }

    def forward(
        self, x: Tensor, timestep: Tensor, y: Tensor | None = None, mask: Tensor | None = None,
        x_mask: Tensor | None = None, static: StaticInputs | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """Noise and variance of x [B, C, T, H, W]: [B, C_out, T, H, W] float32; arguments as for STDiT3."""
        static = self.static_or_prepared(x.shape, static, y=y, mask=mask)
        x_mask = self.token_mask(x_mask, x.shape[2])
        modulation = self.modulation(timestep, static.size, x_mask)
        tokens = self.tokens(x) + self.pos_embed.to(self.dtype)[:, None]
        for index, (block, text) in enumerate(zip(self.blocks, static.text, strict=True)):
            frames = self.pos_embed_temporal.to(self.dtype)[:, :, None] if index == 0 else None
            tokens = block(tokens, modulation, text, static.text_mask, frames)
        return self.unpatch(self.final_layer(tokens, modulation.final, modulation.frames), x.shape[2:])
