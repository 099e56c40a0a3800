"""PixArt-alpha (Chen et al. 2023, arXiv:2310.00426) over images and short videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opensora.models.layers.arguments import arguments_of
from opensora.models.layers.attention import SelfAttention
from opensora.models.layers.blocks import TextBlock
from opensora.models.layers.embeddings import Size3, SizeEmbedder
from opensora.models.layers.fixed_positions import FixedPositions
from opensora.models.layers.transformer import StaticInputs, TextTransformer


class PixArt(FixedPositions, TextTransformer):
    """Predicts noise and variance of an image or video of the latent size it was built for; attends to all patches.

    Args: input_size: latent (T, H, W); space_scale, time_scale: positions are divided by them; base_size: grid side in
    latent pixels to which positions are stretched (by default that of the square of as many patches);
    no_temporal_pos_emb: leave out the positions of frames; freeze: "text"; the rest as for STDiT3.
    """

    def __init__(
        self, input_size: Size3 = (1, 32, 32), in_channels: int = 4, patch_size: Size3 = (1, 2, 2),
        hidden_size: int = 1152, depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1, pred_sigma: bool = True, drop_path: float = 0.0,
        no_temporal_pos_emb: bool = False, caption_channels: int = 4096, model_max_length: int = 120,
        freeze: str | None = None, qk_norm: bool = False, space_scale: float = 1.0, time_scale: float = 1.0,
        base_size: int | None = None,
    ) -> None:  # fmt: skip
        self._build(arguments_of(locals()))
        self.freeze(freeze)

    def _build(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(
            TextBlock(self.hidden_size, self.make_attention(index), config["mlp_ratio"], "both")
            for index in range(config["depth"])
        )
        self.register_positions()
        self.initialize()

    def make_attention(self, index: int) -> SelfAttention:
        """The self-attention of block number `index`."""
        return SelfAttention(self.hidden_size, self.config["num_heads"], self.config["qk_norm"])

    def positions(self) -> dict[str, Tensor]:
        _, rows, columns = self.token_grid(self.input_size)
        base_size, patch = self.config["base_size"], self.patch_size[1]
        side = int((rows * columns) ** 0.5) if base_size is None else base_size // patch
        return {
            "pos_embed": self.grid_positions(self.config["space_scale"], side),
            "pos_embed_temporal": self.frame_positions(self.config["time_scale"]),
        }

    def forward(
        self, x: Tensor, timestep: Tensor, y: Tensor | None = None, mask: Tensor | None = None,
        static: StaticInputs | None = None, **sizes: Any,
    ) -> Tensor:  # fmt: skip
        """Noise and variance of x [B, C, T, H, W]: [B, C_out, T, H, W] float32.

        timestep [B or 1] in 0..1000; y [B, 1, L, C_text]; mask [b, L], 1 for real text tokens. PixArtMS needs hw [b, 2]
        and ar [b, 1], as keywords or in a dictionary `data_info`. `static`, made by `prepare`, replaces all of them.
        """
        static = self.static_or_prepared(x.shape, static, y=y, mask=mask, **sizes)
        modulation = self.modulation(timestep, static.size, None)
        tokens = self.tokens(x) + self.pos_embed.to(self.dtype)[:, None]
        if not self.config["no_temporal_pos_emb"]:
            tokens = tokens + self.pos_embed_temporal.to(self.dtype)[:, :, None]
        for block, text in zip(self.blocks, static.text, strict=True):
            tokens = block(tokens, modulation.blocks, text, static.text_mask)
        return self.unpatch(self.final_layer(tokens, modulation.final, modulation.frames), x.shape[2:])


class PixArtMS(PixArt):
    """The multi-scale PixArt-alpha of 1024 pixels, conditioned on the size and aspect ratio of the image."""

    size_arguments = ("hw", "ar")

    def _build(self, config: dict[str, Any]) -> None:
        super()._build(config)
        self.csize_embedder = SizeEmbedder.third(self.hidden_size)
        self.ar_embedder = SizeEmbedder.third(self.hidden_size)
        self.initialize()

    def static_inputs(
        self, shape: Sequence[int], *, y: Tensor, mask: Tensor | None = None,
        data_info: dict[str, Tensor] | None = None, **sizes: Any,
    ) -> StaticInputs:  # fmt: skip
        sizes = data_info or sizes
        if not sizes.keys() >= {"hw", "ar"}:
            raise ValueError("PixArtMS needs hw and ar (set multi_resolution='PixArtMS')")
        sides, ratio = (sizes[name].float() for name in ("hw", "ar"))
        size = torch.cat([self.csize_embedder(sides, shape[0]), self.ar_embedder(ratio, shape[0])], dim=1)
        return super().static_inputs(shape, y=y, mask=mask)._replace(size=size)
