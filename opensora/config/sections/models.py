"""Sections of diffusion models: keywords and constraints between them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from opensora.config.schema import Count, Many, Name, Positive, Schema, Share, Triple, as_tuple
from opensora.config.sections.common import MAX_PARAMETERS, Depth, Loaded, Scale, Tokens, Width, arg

Heads = Annotated[Positive, Field(le=4_096)]
Patch = Triple[Annotated[Positive, Field(le=64)]]
LatentFrames = Annotated[Positive, Field(le=100_000)]
LatentSide = Annotated[Positive, Field(le=4_096)]
MAX_POSITIONS = 2**20  # tokens with fixed position embeddings
FixedSize = Annotated[tuple[LatentFrames, LatentSide, LatentSide], as_tuple]
AnySize = Annotated[tuple[LatentFrames | None, LatentSide | None, LatentSide | None], as_tuple]
Freeze = Literal["not_temporal", "text"]


class Transformer(Loaded):
    """Keywords of every diffusion model."""

    in_channels: Width = arg(4, "channels of the latents")
    patch_size: Patch = arg((1, 2, 2), "patch size (frames, height, width) in latents")
    hidden_size: Width = arg(1152, "hidden size; a multiple of num_heads")
    depth: Depth = arg(28, "number of blocks")
    num_heads: Heads = arg(16, "attention heads")
    mlp_ratio: Scale = arg(4.0, "hidden size of the MLP, relative to hidden_size")
    class_dropout_prob: Share = arg(0.1, "probability of dropping the text in training, for classifier-free guidance")
    caption_channels: Width = arg(4096, "channels of the text features")
    model_max_length: Tokens = arg(120, "maximum text length in tokens")

    def parameters(self) -> float:
        """Approximate parameter count: attention, cross-attention and MLP of the blocks."""
        return self.depth * self.hidden_size**2 * (8 + 2 * self.mlp_ratio)

    @model_validator(mode="after")
    def _fit(self) -> Any:
        """Checks sizes and divisibility, as far as the keywords involved are given."""
        if self.parameters() > MAX_PARAMETERS:
            sizes = f"hidden_size {self.hidden_size}, depth {self.depth}, mlp_ratio {self.mlp_ratio:g}"
            raise ValueError(f"{sizes} make {self.parameters():.0e} parameters; at most {MAX_PARAMETERS:.0e} are built")
        if self.gives("hidden_size", "num_heads") and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.gives("hidden_size", "mlp_ratio") and self.hidden_size * self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio:g} leaves no width to the feed-forward layers")
        size = getattr(self, "input_size", None)
        if size and None not in size:
            frames, rows, columns = (max(side // patch, 1) for side, patch in zip(size, self.patch_size, strict=True))
            if max(frames, rows * columns) > MAX_POSITIONS:
                raise ValueError(f"input_size {size} has more than {MAX_POSITIONS:,} tokens a frame")
        return self


class STDiT(Transformer):
    """STDiT, Open-Sora 1.0: one fixed clip size."""

    input_size: FixedSize = arg((1, 32, 32), "latent size (frames, height, width) of its fixed clip size")
    pred_sigma: bool = arg(True, "predict the variance as well, for IDDPM")
    drop_path: Share = arg(0.0, "accepted without effect")
    no_temporal_pos_emb: bool = arg(False, "accepted without effect")
    space_scale: Scale = arg(1.0, "spatial positions are divided by it")
    time_scale: Scale = arg(1.0, "temporal positions are divided by it")
    freeze: Freeze | None = arg(None, "parameters to freeze: all but the temporal ones, or the text embedding", "text")


class STDiT2(Transformer):
    """STDiT2, Open-Sora 1.1: clips of any size."""

    input_size: AnySize = arg((None, None, None), "accepted without effect")
    input_sq_size: LatentSide = arg(32, "reference side in pixels for scaling positions", 512)
    pred_sigma: bool = arg(True, "predict the variance as well, for IDDPM")
    drop_path: Share = arg(0.0, "accepted without effect")
    no_temporal_pos_emb: bool = arg(False, "accepted without effect")
    freeze: Freeze | None = arg(None, "parameters to freeze: all but the temporal ones, or the text embedding", "text")
    qk_norm: bool = arg(False, "normalize queries and keys", True)
    qk_norm_legacy: bool = arg(False, "apply that norm after the rotary embedding, as Open-Sora 1.1 does", True)


class STDiT3(Transformer):
    """STDiT3, Open-Sora 1.2 and the embedded model: clips of any size."""

    model_max_length: Tokens = arg(300, "maximum text length in tokens")
    input_size: AnySize = arg((None, None, None), "accepted without effect")
    input_sq_size: LatentSide = arg(512, "reference side in pixels for scaling positions")
    pred_sigma: bool = arg(True, "predict the variance as well, for IDDPM")
    drop_path: Share = arg(0.0, "accepted without effect")
    qk_norm: bool = arg(True, "normalize queries and keys")
    only_train_temporal: bool = arg(False, "train only the temporal blocks")
    freeze_y_embedder: bool = arg(False, "freeze the text embedding")
    skip_y_embedder: bool = arg(False, "text features are already embedded")


class DiT(Transformer):
    """DiT: images and clips of one fixed size, conditioned on classes or a pooled CLIP embedding."""

    input_size: FixedSize = arg((16, 32, 32), "latent size (frames, height, width) of its fixed clip size")
    learn_sigma: bool = arg(True, "predict the variance as well, for IDDPM")
    condition: Annotated[str, Field(pattern=r"^(text|label_[1-9][0-9]{0,5})$")] = arg(
        "text", "conditioning: text, or label_N for N classes", "label_1000"
    )
    no_temporal_pos_emb: bool = arg(False, "no temporal position embedding")
    caption_channels: Width = arg(512, "channels of the text features")
    model_max_length: Tokens = arg(77, "maximum text length in tokens")


class Latte(DiT):
    """Latte: DiT with alternating spatial and temporal blocks, for clips of one fixed size."""


class PixArt(Transformer):
    """PixArt-alpha: images, and clips of 1.0's first stage, of one fixed size."""

    input_size: FixedSize = arg((1, 32, 32), "latent size (frames, height, width) of its fixed clip size")
    pred_sigma: bool = arg(True, "predict the variance as well, for IDDPM")
    drop_path: Share = arg(0.0, "accepted without effect")
    no_temporal_pos_emb: bool = arg(False, "no temporal position embedding")
    freeze: Literal["text"] | None = arg(None, "parameters to freeze: the text embedding", "text")
    qk_norm: bool = arg(False, "normalize queries and keys")
    space_scale: Scale = arg(1.0, "spatial positions are divided by it")
    time_scale: Scale = arg(1.0, "temporal positions are divided by it")
    base_size: LatentSide | None = arg(None, "reference side in tokens for scaling positions", 64)


class PixArtMS(PixArt):
    """PixArt-alpha conditioned on height, width and aspect ratio (multi_resolution="PixArtMS")."""


class Compression(Schema):
    """Key/value token compression, as in PixArt-Sigma at 4K."""

    sampling: Name | None = arg(None, "downsampling of the tokens", "conv")
    scale_factor: Annotated[Positive, Field(le=64)] = arg(1, "downsampling factor per side", 2)
    kv_compress_layer: Many[Count] = arg((), "block indices with compression", (14, 15))


class PixArtSigma(PixArt):
    """PixArt-Sigma: images up to 4K."""

    model_max_length: Tokens = arg(300, "maximum text length in tokens")
    kv_compress_config: Compression | None = arg(None, "key/value token compression", {"sampling": "conv"})
