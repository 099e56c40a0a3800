"""STDiT2, the diffusion transformer of Open-Sora 1.1: any size and length, rotary time (Zheng et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opensora.models.layers.arguments import arguments_of
from opensora.models.layers.attention import Pair, RotaryFrequencies, SelfAttention, rotation_table
from opensora.models.layers.blocks import TextBlock, along, modulated, rows_of
from opensora.models.layers.embeddings import Size3, SizeEmbedder, normal_rows
from opensora.models.layers.linear import Linear
from opensora.models.layers.transformer import StaticInputs, TextTransformer


class STDiT2Block(TextBlock):
    """A spatial block with modulated temporal self-attention before the text."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool, qk_norm_legacy: bool) -> None:
        super().__init__(dim, SelfAttention(dim, num_heads, qk_norm, qk_norm_legacy), mlp_ratio, "space")
        self.attn_temp = SelfAttention(dim, num_heads, qk_norm, qk_norm_legacy)
        self.scale_shift_table_temporal = nn.Parameter(normal_rows(3, dim))

    def forward(
        self, x: Tensor, modulation: Tensor, temporal: Tensor, y: Tensor | Pair, text_mask: Tensor | None,
        rotation: Tensor,
    ) -> Tensor:  # fmt: skip
        """`modulation` [B, T or 1, 6, C] is spatial, `temporal` [B, T or 1, 3, C] that of the attention over frames."""
        rows = rows_of(self.scale_shift_table + modulation)
        x = self.self_attend(x, rows)
        shift, scale, gate = rows_of(self.scale_shift_table_temporal + temporal)
        x = torch.addcmul(x, gate, along("time", self.attn_temp, modulated(x, shift, scale), rotation))
        return self.feed_forward(self.attend_text(x, y, text_mask), rows)


class STDiT2(TextTransformer):
    """Predicts noise and variance of a latent video of any size; conditioned on size, length and frame rate.

    Args: as for STDiT3, and qk_norm_legacy: normalise queries and keys after the rotation, as Open-Sora 1.1 does;
    freeze: "not_temporal" or "text"; input_size and no_temporal_pos_emb have no effect.
    """

    size_arguments = ("num_frames", "height", "width", "ar", "fps")

    def __init__(
        self, input_size: tuple[int | None, int | None, int | None] = (None, None, None), input_sq_size: int = 32,
        in_channels: int = 4, patch_size: Size3 = (1, 2, 2), hidden_size: int = 1152, depth: int = 28,
        num_heads: int = 16, mlp_ratio: float = 4.0, class_dropout_prob: float = 0.1, pred_sigma: bool = True,
        drop_path: float = 0.0, no_temporal_pos_emb: bool = False, caption_channels: int = 4096,
        model_max_length: int = 120, freeze: str | None = None, qk_norm: bool = False, qk_norm_legacy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(arguments_of(locals()))
        self.t_block_temp = nn.Sequential(nn.SiLU(), Linear(hidden_size, 3 * hidden_size))
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

    def _initialize(self) -> None:
        """New temporal attention starts at zero effect."""
        super()._initialize()
        nn.init.normal_(self.t_block_temp[1].weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.attn_temp.proj.weight)

    def forward(
        self, x: Tensor, timestep: Tensor, y: Tensor | None = None, mask: Tensor | None = None,
        x_mask: Tensor | None = None, num_frames: Tensor | None = None, height: Tensor | None = None,
        width: Tensor | None = None, ar: Tensor | None = None, fps: Tensor | None = None,
        static: StaticInputs | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """Noise and variance of x: [B, C_out, T, H, W] float32.

        Arguments as for STDiT3; num_frames [b] in frames, ar [b] height / width.
        """
        sizes = {"num_frames": num_frames, "height": height, "width": width, "ar": ar, "fps": fps}
        static = self.static_or_prepared(x.shape, static, y=y, mask=mask, **sizes)
        x_mask = self.token_mask(x_mask, x.shape[2])
        modulation = self.modulation(timestep, static.size, x_mask)
        temporal = self.rows(self.t_block_temp, self.t_embedder(timestep) + static.length)
        if x_mask is not None:
            given = self.rows(self.t_block_temp, self.t_embedder(torch.zeros_like(timestep)) + static.length)
            temporal = torch.where(x_mask[..., None, None], temporal, given)
        tokens = self.x_embedder(x.to(self.dtype)) + static.positions
        rotation = rotation_table(self.rope.freqs, tokens.shape[1])
        for block, text in zip(self.blocks_in_order(), static.text, strict=True):
            tokens = block(tokens, modulation.blocks, temporal, text, static.text_mask, rotation)
        final = self.t_embedder(timestep)  # without the size, which modulates given frames alone
        return self.unpatch(self.final_layer(tokens, final, modulation.frames), x.shape[2:])

    def static_inputs(
        self, shape: Sequence[int], *, y: Tensor, mask: Tensor | None = None, num_frames: Tensor | None = None,
        height: Tensor | None = None, width: Tensor | None = None, ar: Tensor | None = None, fps: Tensor | None = None,
        **_: Any,
    ) -> StaticInputs:  # fmt: skip
        self.check_given(num_frames=num_frames, height=height, width=width, ar=ar, fps=fps)
        batch = 1 if all(len(one) == 1 for one in (height, width, num_frames, ar, fps)) else shape[0]
        sides = self.csize_embedder(torch.stack((height, width), 1), batch)
        return (
            super()
            .static_inputs(shape, y=y, mask=mask)
            ._replace(
                size=torch.cat((sides, self.ar_embedder(ar, batch)), dim=1),
                length=self.fl_embedder(num_frames, batch) + self.fps_embedder(fps, batch),
                positions=self.scaled_positions(shape, height, width),
            )
        )
