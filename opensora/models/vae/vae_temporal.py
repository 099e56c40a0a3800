"""The causal temporal autoencoder of Open-Sora 1.2: 4 frames of per-frame latents into 1 (after MAGVIT-v2, Yu 2023)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.models.layers.arguments import arguments_of
from opensora.models.vae.blocks import ACTIVATIONS, Activation
from opensora.models.vae.posterior import DiagonalGaussian


class CausalConv3d(nn.Module):
    """3-D convolution that sees only the present and the past: zeros are padded in time on the past side alone."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, time_stride: int = 1, bias: bool = True):
        super().__init__()
        self.kernel, self.time_stride, self.past = kernel, time_stride, kernel - time_stride
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=(time_stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        side = self.kernel // 2
        return self.conv(F.pad(x, (side, side, side, side, self.past, 0)))


class Layout(NamedTuple):
    """Of encoder or decoder: width of each level, blocks a level, and which transitions change the length."""

    widths: list[int]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]
    num_groups: int
    activation: Activation

    def res_blocks(self, before: int, width: int) -> nn.ModuleList:
        """The blocks of one level, the first of which comes from `before` channels."""
        inputs = [before] + [width] * (self.num_res_blocks - 1)
        return nn.ModuleList(ResBlock(channels, width, self.num_groups, self.activation) for channels in inputs)


class ResBlock(nn.Module):
    """Norm, activation, convolution, twice, around a (projected) skip."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, activation: Activation):
        super().__init__()
        self.activation = activation
        self.norm1 = nn.GroupNorm(num_groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, bias=False)
        if in_channels != out_channels:
            self.conv3 = CausalConv3d(in_channels, out_channels, kernel=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inplace = not torch.is_grad_enabled()
        hidden = self.activation(self.norm1(x), inplace=inplace)
        hidden = self.conv1(hidden)
        hidden = self.activation(self.norm2(hidden), inplace=inplace)
        hidden = self.conv2(hidden)
        skip = self.conv3(x) if hasattr(self, "conv3") else x
        return hidden.add_(skip) if inplace else hidden + skip


class Encoder(nn.Module):
    """[B, C_in, T, H, W] -> [B, C_out, T / factor, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, layout: Layout) -> None:
        super().__init__()
        self.activation, widths = layout.activation, layout.widths
        self.conv_in = CausalConv3d(in_channels, widths[0], bias=False)
        below = [widths[0], *widths]  # the width that reaches level i from the level below it
        self.block_res_blocks = nn.ModuleList(layout.res_blocks(below[i], width) for i, width in enumerate(widths))
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(widths[i], widths[i], time_stride=2) if down else nn.Identity()
            for i, down in enumerate(layout.temporal_downsample)
        )
        self.res_blocks = layout.res_blocks(widths[-1], widths[-1])
        self.norm1 = nn.GroupNorm(layout.num_groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], out_channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            for block in blocks:
                x = block(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        for block in self.res_blocks:
            x = block(x)
        return self.conv2(self.activation(self.norm1(x)))


class TimeUpsample(CausalConv3d):
    """Twice as many frames: a convolution to 2 C channels whose pairs become neighbouring frames."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x).unflatten(1, (-1, 2))  # [B, C, 2, T, H, W]
        return x.transpose(2, 3).flatten(2, 3)


class Decoder(nn.Module):
    """[B, C_in, T', H, W] -> [B, C_out, T' * factor, H, W]: the encoder backwards."""

    def __init__(self, in_channels: int, out_channels: int, layout: Layout) -> None:
        super().__init__()
        self.activation, widths = layout.activation, layout.widths
        self.conv1 = CausalConv3d(in_channels, widths[-1])
        self.res_blocks = layout.res_blocks(widths[-1], widths[-1])
        above = [*widths[1:], widths[-1]]  # the width that reaches level i from the level above it
        self.block_res_blocks = nn.ModuleList(layout.res_blocks(above[i], width) for i, width in enumerate(widths))
        self.conv_blocks = nn.ModuleList(
            TimeUpsample(widths[i + 1]) if up else nn.Identity() for i, up in enumerate(layout.temporal_downsample)
        )
        self.norm1 = nn.GroupNorm(layout.num_groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for block in self.res_blocks:
            x = block(x)
        for level in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[level]:
                x = block(x)
            if level > 0:
                x = self.conv_blocks[level - 1](x)
        return self.conv_out(self.activation(self.norm1(x)))


class VAE_Temporal(nn.Module):
    """Compresses the frames of per-frame latents by `time_downsample_factor`; each latent sees only its past.

    Args: in_out_channels, latent_embed_dim, embed_dim: channels of the input, inside, and of the latent; filters and
    channel_multipliers: width of each level; num_res_blocks a level, decoder_num_res_blocks if the decoder has others;
    temporal_downsample: which level transitions halve the frames; num_groups of the group norms; activation_fn: a name
    in ACTIVATIONS.
    """

    def __init__(
        self, in_out_channels: int = 4, latent_embed_dim: int = 4, embed_dim: int = 4, filters: int = 128,
        num_res_blocks: int = 4, channel_multipliers: tuple[int, ...] = (1, 2, 2, 4),
        temporal_downsample: tuple[bool, ...] = (True, True, False), num_groups: int = 32, activation_fn: str = "swish",
        decoder_num_res_blocks: int | None = None,
    ) -> None:  # fmt: skip
        config = arguments_of(locals())
        super().__init__()
        self.config = config
        if len(temporal_downsample) != len(channel_multipliers) - 1:
            raise ValueError("temporal_downsample must have one entry fewer than channel_multipliers")
        if activation_fn not in ACTIVATIONS:
            raise ValueError(f"activation_fn '{activation_fn}' is not known; choose one of {', '.join(ACTIVATIONS)}")
        self.time_downsample_factor = 2 ** sum(temporal_downsample)
        self.out_channels = embed_dim
        widths = [filters * multiplier for multiplier in channel_multipliers]
        layout = Layout(widths, num_res_blocks, tuple(temporal_downsample), num_groups, ACTIVATIONS[activation_fn])
        decoder_layout = layout._replace(num_res_blocks=decoder_num_res_blocks or num_res_blocks)
        self.encoder = Encoder(in_out_channels, 2 * latent_embed_dim, layout)
        self.quant_conv = CausalConv3d(2 * latent_embed_dim, 2 * embed_dim, kernel=1)
        self.post_quant_conv = CausalConv3d(embed_dim, latent_embed_dim, kernel=1)
        self.decoder = Decoder(latent_embed_dim, in_out_channels, decoder_layout)

    def padding(self, num_frames: int) -> int:
        """Frames of zeros put before the first one so that the factor divides the length."""
        return -num_frames % self.time_downsample_factor

    def get_latent_size(self, input_size: tuple[int | None, ...] | list[int | None]) -> list[int | None]:
        """(T, H, W) of the latent of an input (T, H, W); None stays None."""
        frames = input_size[0]
        latent = None if frames is None else (frames + self.padding(frames)) // self.time_downsample_factor
        return [latent, *input_size[1:]]

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """The posterior of x [B, C, T, H, W]: mean and log variance [B, embed_dim, T', H, W]."""
        x = F.pad(x, (0, 0, 0, 0, self.padding(x.shape[2]), 0))
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """z [B, embed_dim, T', H, W] as [B, C, num_frames, H, W], the padded frames dropped."""
        return self.decoder(self.post_quant_conv(z))[:, :, self.padding(num_frames) :]

    def forward(self, x: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussian, Tensor]:
        """(reconstruction, posterior, latent) of x [B, C, T, H, W]."""
        posterior = self.encode(x)
        z = posterior.sample() if sample_posterior else posterior.mean
        return self.decode(z, num_frames=x.shape[2]), posterior, z


def VAE_Temporal_SD(**kwargs: Any) -> VAE_Temporal:
    """The published layout: 128 filters, multipliers 1 2 2 4, halving after the second and third level."""
    return VAE_Temporal(**{"temporal_downsample": (False, True, True), **kwargs})
