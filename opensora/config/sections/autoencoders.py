"""Sections of autoencoders."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from opensora.config.schema import Many, Name, Number, Positive
from opensora.config.sections.common import Frames, Loaded, arg

MAX_LEVELS = 16
Width = Annotated[Positive, Field(le=16_384)]
Widths = Annotated[Many[Width], Field(min_length=1, max_length=MAX_LEVELS)]
DownBlock = Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
UpBlock = Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]
DownBlocks = Annotated[Many[DownBlock], Field(min_length=1, max_length=MAX_LEVELS)]
UpBlocks = Annotated[Many[UpBlock], Field(min_length=1, max_length=MAX_LEVELS)]
Switches = Annotated[Many[bool], Field(max_length=MAX_LEVELS)]
Multiples = Annotated[Many[Annotated[Positive, Field(le=64)]], Field(min_length=1, max_length=8)]
Levels = Annotated[Many[Number], Field(min_length=1, max_length=1024)]
Layers = Annotated[Positive, Field(le=32)]
MicroBatch = Frames | None
DOWN, UP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
MICRO_BATCH = "frames encoded or decoded together; None: as many as fit"


class _ByFrame(Loaded):
    micro_batch_size: MicroBatch = arg(None, MICRO_BATCH, 4)
    in_channels: Width = arg(3, "input channels")
    out_channels: Width = arg(3, "output channels")
    latent_channels: Width = arg(4, "latent channels")
    layers_per_block: Layers = arg(2, "residual layers per level")
    block_out_channels: Widths = arg((128, 256, 512, 512), "channels of each level")
    down_block_types: DownBlocks = arg(DOWN, "block of each level of the encoder, as named in diffusers")

    @model_validator(mode="after")
    def _fit(self) -> Any:
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if self.gives("block_out_channels", name) and len(getattr(self, name)) != levels:
                raise ValueError(f"{name} must have {levels} entries, as many as block_out_channels")
        return self


class VideoAutoencoderKL(_ByFrame):
    """AutoencoderKL of Stable Diffusion, applied per frame."""

    up_block_types: UpBlocks = arg(UP, "block of each level of the decoder, as named in diffusers")
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = arg("silu", "activation")
    norm_num_groups: Width = arg(32, "groups of the group norms")
    mid_block_add_attention: bool = arg(True, "attention in the middle block")

    @model_validator(mode="after")
    def _grouped(self) -> Any:
        widths, groups = self.block_out_channels, self.norm_num_groups
        if self.gives("block_out_channels", "norm_num_groups") and any(width % groups for width in widths):
            raise ValueError(f"block_out_channels {widths} must be multiples of norm_num_groups {groups}")
        return self


class VideoAutoencoderKLTemporalDecoder(_ByFrame):
    """AutoencoderKLTemporalDecoder of Stable Video Diffusion."""


class VAETemporal(Loaded):
    """Temporal autoencoder over per-frame latents."""

    in_out_channels: Width = arg(4, "channels of the per-frame latents")
    latent_embed_dim: Width = arg(4, "channels of its own latents")
    embed_dim: Width = arg(4, "channels before sampling the latents")
    filters: Width = arg(128, "channels of the first level")
    num_res_blocks: Layers = arg(4, "residual blocks per level")
    channel_multipliers: Multiples = arg((1, 2, 2, 4), "channels of each level, in multiples of filters")
    temporal_downsample: Switches = arg(
        (True, True, False), "levels that halve the number of frames; one entry fewer than levels"
    )
    num_groups: Width = arg(32, "groups of the group norms")
    activation_fn: Literal["swish", "silu", "relu", "gelu"] = arg("swish", "activation")
    decoder_num_res_blocks: Layers | None = arg(
        None, "residual blocks per level of the decoder; default: num_res_blocks", 4
    )

    @model_validator(mode="after")
    def _fit(self) -> Any:
        levels = len(self.channel_multipliers)
        if self.gives("channel_multipliers", "temporal_downsample") and len(self.temporal_downsample) != levels - 1:
            raise ValueError("temporal_downsample must have one entry fewer than channel_multipliers")
        if self.gives("filters", "num_groups") and self.filters % self.num_groups:
            raise ValueError(f"filters {self.filters} must be a multiple of num_groups {self.num_groups}")
        return self


class SpatialPart(VideoAutoencoderKL):
    """The per-frame autoencoder of a pipeline."""

    type: Name = arg("VideoAutoencoderKL", "VideoAutoencoderKL")


class TemporalPart(VAETemporal):
    """The temporal autoencoder of a pipeline."""

    type: Name = arg("VAE_Temporal", "VAE_Temporal, or VAE_Temporal_SD, the published one")


class VideoAutoencoderPipeline(Loaded):
    """A per-frame and a temporal autoencoder, as in Open-Sora 1.2."""

    vae_2d: SpatialPart | None = arg(None, "per-frame autoencoder", {"latent_channels": 4})
    vae_temporal: TemporalPart | None = arg(None, "temporal autoencoder", {"filters": 128})
    freeze_vae_2d: bool = arg(False, "freeze the per-frame autoencoder")
    cal_loss: bool = arg(False, "accepted; training sets it")
    micro_frame_size: MicroBatch = arg(None, "frames per chunk; None: the whole clip", 17)
    micro_batch_size: MicroBatch = arg(None, MICRO_BATCH, 4)
    shift: Number | Levels = arg(0.0, "shift subtracted from the latents, one number or one per channel")
    scale: Number | Levels = arg(1.0, "scale that divides the latents, one number or one per channel")


class OpenSoraVAE(VideoAutoencoderPipeline):
    """The published 1.2 autoencoder; defaults: micro_frame_size 17, micro_batch_size 4."""
