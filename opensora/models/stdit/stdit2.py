"""STDiT2, the diffusion transformer of Open-Sora 1.1: any size and length, rotary time (Zheng et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opensora.models.layers.arguments import arguments_of
from opensora.models.layers.attention import Pair, RotaryFrequencies, SelfAttention, rotation_table
from opensora.models.layers.blocks import TextBlock, along, rows_of
from opensora.models.layers.embeddings import Size3, SizeEmbedder
from opensora.models.layers.transformer import SizedTransformer, Text, made_once


class STDiT2Block(TextBlock):
    """A spatial block with modulated temporal self-attention before the text."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool, qk_norm_legacy: bool) -> None:
        super().__init__(dim, SelfAttention(dim, num_heads, qk_norm, qk_norm_legacy), mlp_ratio, "space")
        self.attn_temp = SelfAttention(dim, num_heads, qk_norm, qk_norm_legacy)
        self.scale_shift_table_temporal = nn.Parameter(torch.randn(3, dim) / dim**0.5)

    def forward(
        self, x: Tensor, modulation: Tensor, temporal: Tensor, y: Tensor | Pair, keep: Tensor | None,
        rotation: Tensor,
    ) -> Tensor:  # fmt: skip
        """`modulation` [B, T or 1, 6, C] is the spatial one, `temporal` [B, T or 1, 3, C] that of the frames."""
        rows = rows_of(self.scale_shift_table + modulation)
        x = self.attend(x, rows)
        shift, scale, gate = rows_of(self.scale_shift_table_temporal + temporal)
        x = torch.addcmul(x, gate, along("time", self.attn_temp, self.modulate(x, shift, scale), rotation))
        return self.feed(self.read(x, y, keep), rows)


class STDiT2(SizedTransformer):
    """Predicts noise and variance of a latent video of any size; told its size, ratio, length and frame rate.

    Args: as for STDiT3, and qk_norm_legacy: normalise queries and keys after the rotation, as Open-Sora 1.1 does;
    freeze: "not_temporal" or "text"; input_size and no_temporal_pos_emb have no effect.
    """

    def __init__(
        self, input_size: tuple[int | None, int | None, int | None] = (None, None, None), input_sq_size: int = 32,
        in_channels: int = 4, patch_size: Size3 = (1, 2, 2), hidden_size: int = 1152, depth: int = 28,
        num_heads: int = 16, mlp_ratio: float = 4.0, class_dropout_prob: float = 0.1, pred_sigma: bool = True,
        drop_path: float = 0.0, no_temporal_pos_emb: bool = False, caption_channels: int = 4096,
        model_max_length: int = 120, freeze: str | None = None, qk_norm: bool = False, qk_norm_legacy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(arguments_of(locals()))
        self.t_block_temp = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 3 * hidden_size))
        self.rope = RotaryFrequencies(hidden_size // num_heads)
        self.csize_embedder = SizeEmbedder.third(hidden_size)
        self.ar_embedder = SizeEmbedder.third(hidden_size)
        self.fl_embedder = SizeEmbedder(hidden_size)
        self.fps_embedder = SizeEmbedder(hidden_size)
        self.blocks = nn.ModuleList(
            STDiT2Block(hidden_size, num_heads, mlp_ratio, qk_norm, qk_norm_legacy) for _ in range(depth)
        )
        self.initialize()
        self.freeze(freeze, temporal=("attn_temp", "scale_shift_table_temporal", "t_block_temp", "fl_", "fps_"))

    def initialize(self) -> None:
        """New temporal attention starts at zero effect."""
        super().initialize()
        nn.init.normal_(self.t_block_temp[1].weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.attn_temp.proj.weight)

    def forward(
        self, x: Tensor, timestep: Tensor, y: Tensor | Text, mask: Tensor | None = None, x_mask: Tensor | None = None,
        num_frames: Tensor | None = None, height: Tensor | None = None, width: Tensor | None = None,
        ar: Tensor | None = None, fps: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """Noise and variance of x: [B, C_out, T, H, W] float32.

        Arguments as for STDiT3; num_frames [b] in frames, ar [b] height / width.
        """
        self.check_given(num_frames=num_frames, height=height, width=width, ar=ar, fps=fps)
        sides = height, width
        batch = 1 if all(len(one) == 1 for one in (*sides, num_frames, ar, fps)) else len(x)
        size = made_once(
            y, ("size", batch),
            lambda: torch.cat((self.csize_embedder(torch.stack(sides, 1), batch), self.ar_embedder(ar, batch)), dim=1),
        )  # fmt: skip
        pace = made_once(
            y, ("pace", batch), lambda: self.fl_embedder(num_frames, batch) + self.fps_embedder(fps, batch)
        )
        modulation = self.modulation(timestep, size, x_mask)
        temporal = self.rows(self.t_block_temp, self.t_embedder(timestep) + pace)
        if x_mask is not None:
            given = self.rows(self.t_block_temp, self.t_embedder(torch.zeros_like(timestep)) + pace)
            temporal = torch.where(x_mask[..., None, None], temporal, given)
        tokens, (texts, keep) = self.tokens(x, height, width, y), self.texts(y, mask, len(x))
        rotation = rotation_table(self.rope.freqs, tokens.shape[1])
        for block, y in zip(self.blocks, texts, strict=True):
            tokens = block(tokens, modulation.blocks, temporal, y, keep, rotation)
        plain = modulation._replace(final=self.t_embedder(timestep))  # without the size, which given frames keep
        return self.unembed(tokens, plain, x.shape[2:])
