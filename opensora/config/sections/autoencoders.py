"""Sections of autoencoders."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from opensora.config.schema import Many, Name, Number, Positive
from opensora.config.sections.common import Frames, Loaded, arg

MAX_LEVELS = 16
Width = Annotated[Positive, Field(le=16_384)]
Widths = Annotated[Many[Width], Field(min_length=1, max_length=MAX_LEVELS)]
Names = Annotated[Many[Name], Field(min_length=1, max_length=MAX_LEVELS)]
Switches = Annotated[Many[bool], Field(max_length=MAX_LEVELS)]
Multiples = Annotated[Many[Annotated[Positive, Field(le=64)]], Field(min_length=1, max_length=8)]
Levels = Annotated[Many[Number], Field(min_length=1, max_length=1024)]
Layers = Annotated[Positive, Field(le=32)]
AtOnce = Frames | None
DOWN, UP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
AT_ONCE = "frames it takes at once; without it, as many as fit"


class _ByFrame(Loaded):
    micro_batch_size: AtOnce = arg(None, AT_ONCE, 4)
    in_channels: Width = arg(3, "channels of the pictures")
    out_channels: Width = arg(3, "channels of the pictures it makes")
    latent_channels: Width = arg(4, "channels of the latents")
    layers_per_block: Layers = arg(2, "residual layers of a level")
    block_out_channels: Widths = arg((128, 256, 512, 512), "channels of each level")
    down_block_types: Names = arg(DOWN, "kinds of the encoder's levels, names of diffusers")

    @model_validator(mode="after")
    def _fit(self) -> Any:
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if self.together("block_out_channels", name) and len(getattr(self, name)) != levels:
                raise ValueError(f"{name} must have {levels} entries, as many as block_out_channels")
        return self


class VideoAutoencoderKL(_ByFrame):
    """The image autoencoder of Stable Diffusion, frame by frame."""

    up_block_types: Names = arg(UP, "kinds of the decoder's levels, names of diffusers")
    act_fn: Name = arg("silu", "activation, a name of diffusers")
    norm_num_groups: Width = arg(32, "groups of the normalisations")
    mid_block_add_attention: bool = arg(True, "attention between encoder and decoder levels")

    @model_validator(mode="after")
    def _grouped(self) -> Any:
        widths, groups = self.block_out_channels, self.norm_num_groups
        if self.together("block_out_channels", "norm_num_groups") and any(width % groups for width in widths):
            raise ValueError(f"block_out_channels {widths} must be multiples of norm_num_groups {groups}")
        return self


class VideoAutoencoderKLTemporalDecoder(_ByFrame):
    """The autoencoder of Stable Video Diffusion."""


class VAETemporal(Loaded):
    """The autoencoder along time, over the latents of frames."""

    in_out_channels: Width = arg(4, "channels of the frames' latents")
    latent_embed_dim: Width = arg(4, "channels of its latents")
    embed_dim: Width = arg(4, "channels before the latents are drawn")
    filters: Width = arg(128, "channels of the first level")
    num_res_blocks: Layers = arg(4, "residual blocks of a level")
    channel_multipliers: Multiples = arg((1, 2, 2, 4), "channels of each level, in filters")
    temporal_downsample: Switches = arg((True, True, False), "which levels halve the frames; one entry fewer")
    num_groups: Width = arg(32, "groups of the normalisations")
    activation_fn: Literal["swish", "silu", "relu", "gelu"] = arg("swish", "activation")

    @model_validator(mode="after")
    def _fit(self) -> Any:
        levels = len(self.channel_multipliers)
        if self.together("channel_multipliers", "temporal_downsample") and len(self.temporal_downsample) != levels - 1:
            raise ValueError("temporal_downsample needs one entry fewer than channel_multipliers")
        if self.together("filters", "num_groups") and self.filters % self.num_groups:
            raise ValueError(f"filters {self.filters} must be a multiple of num_groups {self.num_groups}")
        return self


class SpatialPart(VideoAutoencoderKL):
    """The image autoencoder of a pipeline."""

    type: Name = arg("VideoAutoencoderKL", "VideoAutoencoderKL")


class TemporalPart(VAETemporal):
    """The temporal autoencoder of a pipeline."""

    type: Name = arg("VAE_Temporal", "VAE_Temporal, or VAE_Temporal_SD, the published one")


class VideoAutoencoderPipeline(Loaded):
    """An image autoencoder and one along time, as of Open-Sora 1.2."""

    vae_2d: SpatialPart | None = arg(None, "its image autoencoder", {"latent_channels": 4})
    vae_temporal: TemporalPart | None = arg(None, "its temporal autoencoder", {"filters": 128})
    freeze_vae_2d: bool = arg(False, "do not train the image autoencoder")
    cal_loss: bool = arg(False, "accepted from older files; training sets it")
    micro_frame_size: AtOnce = arg(None, "frames of a chunk; without it, the whole clip", 17)
    micro_batch_size: AtOnce = arg(None, AT_ONCE, 4)
    shift: Number | Levels = arg(0.0, "what is taken off the latents, one number or one a channel")
    scale: Number | Levels = arg(1.0, "what they are divided by")


class OpenSoraVAE(VideoAutoencoderPipeline):
    """The published 1.2 autoencoder: micro_frame_size is 17 and micro_batch_size 4 unless given."""
