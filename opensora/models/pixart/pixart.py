"""PixArt-alpha (Chen et al. 2023, arXiv:2310.00426) over images and short videos."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opensora.models.layers.arguments import arguments_of
from opensora.models.layers.attention import SelfAttention
from opensora.models.layers.blocks import TextBlock
from opensora.models.layers.embeddings import Size3, SizeEmbedder
from opensora.models.layers.transformer import FixedPositions, Text, TextTransformer


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

    def size_condition(self, data_info: dict[str, Tensor], batch_size: int) -> Tensor | float:
        """What is added to the time embedding for the size of the image: nothing here."""
        return 0

    def forward(
        self, x: Tensor, timestep: Tensor, y: Tensor | Text, mask: Tensor | None = None,
        data_info: dict[str, Tensor] | None = None, **sizes: Any,
    ) -> Tensor:  # fmt: skip
        """Noise and variance of x [B, C, T, H, W]: [B, C_out, T, H, W] float32.

        timestep [B] in 0..1000; y [B, 1, L, C_text]; mask [b, L], 1 for real text tokens. PixArtMS needs hw [b, 2] and
        ar [b, 1], in `data_info` or as keywords of their own.
        """
        modulation = self.modulation(timestep, self.size_condition(data_info or sizes, len(x)), None)
        tokens, (texts, keep) = self.tokens(x) + self.pos_embed.to(self.dtype)[:, None], self.texts(y, mask, len(x))
        if not self.config["no_temporal_pos_emb"]:
            tokens = tokens + self.pos_embed_temporal.to(self.dtype)[:, :, None]
        for block, y in zip(self.blocks, texts, strict=True):
            tokens = block(tokens, modulation.blocks, y, keep)
        return self.unembed(tokens, modulation, x.shape[2:])


class PixArtMS(PixArt):
    """The multi-scale PixArt-alpha of 1024 pixels: it is told the size and aspect ratio of the image."""

    def _build(self, config: dict[str, Any]) -> None:
        super()._build(config)
        self.csize_embedder = SizeEmbedder.third(self.hidden_size)
        self.ar_embedder = SizeEmbedder.third(self.hidden_size)
        self.initialize()

    def size_condition(self, data_info: dict[str, Tensor], batch_size: int) -> Tensor:
        if not data_info.keys() >= {"hw", "ar"}:
            raise ValueError("PixArtMS needs hw and ar (set multi_resolution='PixArtMS')")
        sides, ratio = (data_info[name].float() for name in ("hw", "ar"))
        return torch.cat([self.csize_embedder(sides, batch_size), self.ar_embedder(ratio, batch_size)], dim=1)
