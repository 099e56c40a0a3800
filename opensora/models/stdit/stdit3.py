"""STDiT3, the diffusion transformer of Open-Sora 1.2: spatial and temporal blocks in turn (Zheng et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from opensora.models.layers.arguments import arguments_of
from opensora.models.layers.attention import RotaryFrequencies, SelfAttention, rotation_table, unpack_text
from opensora.models.layers.blocks import TemporalTextBlock, TextBlock
from opensora.models.layers.embeddings import Size3, SizeEmbedder
from opensora.models.layers.transformer import StaticInputs, TextTransformer


class STDiT3(TextTransformer):
    """Predicts the rectified-flow velocity (and a variance, when pred_sigma) of a latent video.

    Args (keywords as in the published config.json):
        hidden_size, depth, num_heads, mlp_ratio: `depth` spatial and `depth` temporal blocks.
        in_channels, patch_size: latent channels and (t, h, w) patch; input_size has no effect.
        caption_channels, model_max_length: width and largest length of the text features.
        input_sq_size: side in pixels of the square at which the position scale is 1.
        pred_sigma: return 2 x in_channels channels.  qk_norm: RMS norm on queries and keys.
        skip_y_embedder: the text arrives projected and packed.  freeze_y_embedder: do not train its projection.
        only_train_temporal: train the temporal blocks alone.
        class_dropout_prob, drop_path: kept for training programs; they do not change the forward pass.
    """

    size_arguments = ("fps", "height", "width")

    def __init__(
        self, input_size: tuple[int | None, int | None, int | None] = (None, None, None), input_sq_size: int = 512,
        in_channels: int = 4, patch_size: Size3 = (1, 2, 2), hidden_size: int = 1152, depth: int = 28,
        num_heads: int = 16, mlp_ratio: float = 4.0, class_dropout_prob: float = 0.1, pred_sigma: bool = True,
        drop_path: float = 0.0, caption_channels: int = 4096, model_max_length: int = 300, qk_norm: bool = True,
        only_train_temporal: bool = False, freeze_y_embedder: bool = False, skip_y_embedder: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(arguments_of(locals()))
        self.skip_y_embedder = skip_y_embedder
        self.rope = RotaryFrequencies(hidden_size // num_heads)
        self.fps_embedder = SizeEmbedder(hidden_size)

        def attention() -> SelfAttention:
            return SelfAttention(hidden_size, num_heads, qk_norm)

        self.spatial_blocks = nn.ModuleList(
            TextBlock(hidden_size, attention(), mlp_ratio, "space") for _ in range(depth)
        )
        self.temporal_blocks = nn.ModuleList(
            TemporalTextBlock(hidden_size, attention(), mlp_ratio) for _ in range(depth)
        )
        self.initialize()
        if only_train_temporal:
            self.requires_grad_(False)
            self.temporal_blocks.requires_grad_(True)
        if freeze_y_embedder:
            self.y_embedder.requires_grad_(False)

    def _initialize(self) -> None:
        """New temporal blocks start at zero effect; the spatial ones keep their text."""
        super()._initialize()
        for block in self.spatial_blocks:
            nn.init.xavier_uniform_(block.cross_attn.proj.weight)
        for block in self.temporal_blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)

    def forward(
        self, x: Tensor, timestep: Tensor, y: Tensor | None = None, mask: Tensor | None = None,
        x_mask: Tensor | None = None, fps: Tensor | None = None, height: Tensor | None = None,
        width: Tensor | None = None, static: StaticInputs | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """Velocity (and variance) of x: [B, C_out, T, H, W] float32.

        x [B, C, T, H, W] latents; timestep [B or 1] in 0..1000; x_mask [B, T or T'] bool of latent frames or frames of
        tokens, False frames are given and modulated at timestep 0; y [B, 1, L, C_text] text features (packed
        [1, sum, C] with skip_y_embedder); mask [b, L], 1 for real text tokens (or the lengths [b]); fps, height, width
        [b] in frames per second and pixels.
        Rows b < B are tiled. `static`, which `prepare` makes, replaces all from y on. Other size arguments of the
        family (num_frames, ar) are accepted and have no effect.
        """
        static = self.static_or_prepared(x.shape, static, y=y, mask=mask, fps=fps, height=height, width=width)
        x_mask = self.token_mask(x_mask, x.shape[2])
        modulation = self.modulation(timestep, static.size, x_mask)
        tokens = self.x_embedder(x.to(self.dtype)) + static.positions
        rotation = rotation_table(self.rope.freqs, tokens.shape[1])
        for block, text in zip(self.blocks_in_order(), static.text, strict=True):
            positions = (rotation,) if block.axis == "time" else ()
            tokens = block(tokens, modulation.blocks, text, static.text_mask, *positions)
        return self.unpatch(self.final_layer(tokens, modulation.final, modulation.frames), x.shape[2:])

    def static_inputs(
        self, shape: Sequence[int], *, y: Tensor, mask: Tensor | None = None,
        fps: Tensor | None = None, height: Tensor | None = None, width: Tensor | None = None, **_: Any,
    ) -> StaticInputs:  # fmt: skip
        self.check_given(fps=fps, height=height, width=width)
        size = self.fps_embedder(fps, 1 if len(fps) == 1 else shape[0])
        positions = self.scaled_positions(shape, height, width)
        return super().static_inputs(shape, y=y, mask=mask)._replace(size=size, positions=positions)

    def embed_text(self, y: Tensor, mask: Tensor | None, batch_size: int) -> tuple[Tensor, Tensor | None]:
        if not self.skip_y_embedder:
            return super().embed_text(y, mask, batch_size)
        if mask is None:
            raise ValueError("packed text needs its lengths in mask")
        lengths = mask if mask.ndim == 1 else mask.sum(dim=1)
        return unpack_text(y.to(self.dtype), lengths.tolist())

    def blocks_in_order(self) -> list[TextBlock]:
        """Spatial before temporal."""
        return [block for pair in zip(self.spatial_blocks, self.temporal_blocks, strict=True) for block in pair]
