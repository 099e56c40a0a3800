"""PixArt-Sigma (Chen et al. 2024, arXiv:2403.04692): PixArt whose deeper blocks may attend to compressed tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from opensora.errors import ConfigError, did_you_mean
from opensora.models.layers.arguments import arguments_of
from opensora.models.layers.attention import SelfAttention
from opensora.models.layers.embeddings import Size3
from opensora.models.pixart.pixart import PixArt

SAMPLINGS = ("conv", "uniform", "ave", "uniform_every")


class CompressedAttention(SelfAttention):
    """Self-attention to keys and values compressed to one in `factor` x `factor` patches (section 2.3).

    Args: grid: rows and columns of a frame's patches; sampling: "conv" (a learned depthwise convolution and a layer
    norm), "uniform" or "ave" (the first patch of each square: what the authors' average does), "uniform_every" (each
    `factor`-th token).
    """

    def __init__(
        self, dim: int, num_heads: int, qk_norm: bool, grid: tuple[int, int], sampling: str, factor: int
    ) -> None:
        super().__init__(dim, num_heads, qk_norm)
        self.grid, self.sampling, self.factor = grid, sampling, factor
        if sampling == "conv":
            self.sr = nn.Conv2d(dim, dim, factor, factor, groups=dim)
            nn.init.constant_(self.sr.weight, 1 / factor**2)  # starts as an average
            nn.init.zeros_(self.sr.get_parameter("bias"))
            self.norm = nn.LayerNorm(dim)

    def compress(self, x: Tensor) -> Tensor:
        if self.sampling == "uniform_every":
            return x[:, :: self.factor]
        frames = x.unflatten(1, (-1, *self.grid))  # [N, T, rows, columns, C]
        if self.sampling != "conv":
            return frames[:, :, :: self.factor, :: self.factor].flatten(1, 3)
        kept = self.sr(frames.flatten(0, 1).permute(0, 3, 1, 2))  # [N * T, C, rows / factor, columns / factor]
        return self.norm(kept.flatten(2).transpose(1, 2).reshape(len(x), -1, x.shape[2]))


class PixArt_Sigma(PixArt):
    """PixArt with key/value compression in some blocks.

    Args: kv_compress_config: dict of sampling (see CompressedAttention; None for none), scale_factor, and
    kv_compress_layer, the indices of the blocks; the rest as for PixArt.
    """

    def __init__(
        self, input_size: Size3 = (1, 32, 32), in_channels: int = 4, patch_size: Size3 = (1, 2, 2),
        hidden_size: int = 1152, depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1, pred_sigma: bool = True, drop_path: float = 0.0,
        no_temporal_pos_emb: bool = False, caption_channels: int = 4096, model_max_length: int = 300,
        freeze: str | None = None, qk_norm: bool = False, space_scale: float = 1.0, time_scale: float = 1.0,
        base_size: int | None = None, kv_compress_config: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._build(arguments_of(locals()))
        self.freeze(freeze)

    def make_attention(self, index: int) -> SelfAttention:
        compress = self.config["kv_compress_config"] or {}
        sampling, factor = compress.get("sampling"), int(compress.get("scale_factor", 1))
        if sampling is None or factor == 1 or index not in compress.get("kv_compress_layer", ()):
            return super().make_attention(index)
        if sampling not in SAMPLINGS:
            hint = did_you_mean(sampling, SAMPLINGS) or f"; choose one of {', '.join(SAMPLINGS)}"
            raise ConfigError(f"kv_compress_config: sampling '{sampling}' is not known{hint}")
        heads, grid = self.config["num_heads"], self.token_grid(self.input_size)[1:]
        return CompressedAttention(self.hidden_size, heads, self.config["qk_norm"], grid, sampling, factor)
