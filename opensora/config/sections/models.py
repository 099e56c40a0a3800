"""Sections of diffusion models: the keywords of each, and what must fit together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from opensora.config.schema import Count, Many, Name, Positive, Schema, Share, Triple, as_tuple
from opensora.config.sections.common import MAX_PARAMETERS, Depth, Loaded, Scale, Tokens, Width, arg

Heads = Annotated[Positive, Field(le=4_096)]
Patch = Triple[Annotated[Positive, Field(le=64)]]
LatentFrames = Annotated[Positive, Field(le=100_000)]
LatentSide = Annotated[Positive, Field(le=4_096)]
MAX_POSITIONS = 2**20  # tokens of a clip that fixed positions are made for
FixedSize = Annotated[tuple[LatentFrames, LatentSide, LatentSide], as_tuple]
AnySize = Annotated[tuple[LatentFrames | None, LatentSide | None, LatentSide | None], as_tuple]
Freeze = Literal["not_temporal", "text"]


class Transformer(Loaded):
    """What every diffusion model has."""

    in_channels: Width = arg(4, "channels of the latents")
    patch_size: Patch = arg((1, 2, 2), "latents (frames, height, width) of a token")
    hidden_size: Width = arg(1152, "channels of a token; a multiple of num_heads")
    depth: Depth = arg(28, "number of blocks")
    num_heads: Heads = arg(16, "heads of the attention")
    mlp_ratio: Scale = arg(4.0, "width of the feed-forward layers, in hidden sizes")
    class_dropout_prob: Share = arg(0.1, "share of training examples without their text, for guidance")
    caption_channels: Width = arg(4096, "channels of the text features")
    model_max_length: Tokens = arg(120, "most tokens of a text")

    def parameters(self) -> float:
        """About how many there are: attention, cross-attention and feed-forward layers of the blocks."""
        return self.depth * self.hidden_size**2 * (8 + 2 * self.mlp_ratio)

    @model_validator(mode="after")
    def _fit(self) -> Any:
        """Refuses what no device can hold and what cannot be divided; only keywords that are given together."""
        if self.parameters() > MAX_PARAMETERS:
            sizes = f"hidden_size {self.hidden_size}, depth {self.depth}, mlp_ratio {self.mlp_ratio:g}"
            raise ValueError(f"{sizes} make {self.parameters():.0e} parameters; at most {MAX_PARAMETERS:.0e} are built")
        if self.together("hidden_size", "num_heads") and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.together("hidden_size", "mlp_ratio") and self.hidden_size * self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio:g} leaves no width to the feed-forward layers")
        size = getattr(self, "input_size", None)
        if size and None not in size:
            frames, rows, columns = (max(side // patch, 1) for side, patch in zip(size, self.patch_size, strict=True))
            if max(frames, rows * columns) > MAX_POSITIONS:
                raise ValueError(f"input_size {size} has more than {MAX_POSITIONS:,} tokens a frame")
        return self


class STDiT(Transformer):
    """Open-Sora 1.0: clips of one size."""

    input_size: FixedSize = arg((1, 32, 32), "latents (frames, height, width) of the one size it makes")
    pred_sigma: bool = arg(True, "also predict the variance, for IDDPM")
    drop_path: Share = arg(0.0, "accepted from older files; has no effect")
    no_temporal_pos_emb: bool = arg(False, "accepted from older files; has no effect")
    space_scale: Scale = arg(1.0, "positions in a frame are divided by it")
    time_scale: Scale = arg(1.0, "positions in time are divided by it")
    freeze: Freeze | None = arg(None, "parameters not to train: all but the temporal ones, or the text's", "text")


class STDiT2(Transformer):
    """Open-Sora 1.1: clips of any size."""

    input_size: AnySize = arg((None, None, None), "accepted from older files; has no effect")
    input_sq_size: LatentSide = arg(32, "side in pixels that positions are scaled to", 512)
    pred_sigma: bool = arg(True, "also predict the variance, for IDDPM")
    drop_path: Share = arg(0.0, "accepted from older files; has no effect")
    no_temporal_pos_emb: bool = arg(False, "accepted from older files; has no effect")
    freeze: Freeze | None = arg(None, "parameters not to train: all but the temporal ones, or the text's", "text")
    qk_norm: bool = arg(False, "normalise queries and keys", True)
    qk_norm_legacy: bool = arg(False, "normalise them after the rotation, as Open-Sora 1.1 does", True)


class STDiT3(Transformer):
    """Open-Sora 1.2 and the embedded model: clips of any size."""

    model_max_length: Tokens = arg(300, "most tokens of a text")
    input_size: AnySize = arg((None, None, None), "accepted from older files; has no effect")
    input_sq_size: LatentSide = arg(512, "side in pixels that positions are scaled to")
    pred_sigma: bool = arg(True, "also predict the variance, for IDDPM")
    drop_path: Share = arg(0.0, "accepted from older files; has no effect")
    qk_norm: bool = arg(True, "normalise queries and keys")
    only_train_temporal: bool = arg(False, "train the temporal blocks alone")
    freeze_y_embedder: bool = arg(False, "do not train the text's embedding")
    skip_y_embedder: bool = arg(False, "the text features come embedded")


class DiT(Transformer):
    """Images and clips of one size, conditioned on classes or a pooled CLIP text."""

    input_size: FixedSize = arg((16, 32, 32), "latents (frames, height, width) of the one size it makes")
    learn_sigma: bool = arg(True, "also predict the variance, for IDDPM")
    condition: Annotated[str, Field(pattern=r"^(text|label_[1-9][0-9]{0,5})$")] = arg(
        "text", "conditioning: text, or label_N for N classes", "label_1000"
    )
    no_temporal_pos_emb: bool = arg(False, "without positions in time")
    caption_channels: Width = arg(512, "channels of the text features")
    model_max_length: Tokens = arg(77, "most tokens of a text")


class Latte(DiT):
    """Clips of one size, conditioned on classes or a pooled CLIP text; space and time in turn."""


class PixArt(Transformer):
    """PixArt-alpha: images, and clips of 1.0's first stage, of one size."""

    input_size: FixedSize = arg((1, 32, 32), "latents (frames, height, width) of the one size it makes")
    pred_sigma: bool = arg(True, "also predict the variance, for IDDPM")
    drop_path: Share = arg(0.0, "accepted from older files; has no effect")
    no_temporal_pos_emb: bool = arg(False, "without positions in time")
    freeze: Literal["text"] | None = arg(None, "parameters not to train: the text's", "text")
    qk_norm: bool = arg(False, "normalise queries and keys")
    space_scale: Scale = arg(1.0, "positions in a frame are divided by it")
    time_scale: Scale = arg(1.0, "positions in time are divided by it")
    base_size: LatentSide | None = arg(None, "tokens of a side that positions are scaled to", 64)


class PixArtMS(PixArt):
    """PixArt-alpha conditioned on height, width and ratio (multi_resolution="PixArtMS")."""


class Compression(Schema):
    """Keys and values of fewer tokens, as in PixArt-Sigma at 4K."""

    sampling: Name | None = arg(None, "how tokens are joined", "conv")
    scale_factor: Annotated[Positive, Field(le=64)] = arg(1, "by how many tokens of each side", 2)
    kv_compress_layer: Many[Count] = arg((), "numbers of the blocks that do", (14, 15))


class PixArtSigma(PixArt):
    """PixArt-Sigma: images up to 4K."""

    model_max_length: Tokens = arg(300, "most tokens of a text")
    kv_compress_config: Compression | None = arg(None, "compressed keys and values", {"sampling": "conv"})
