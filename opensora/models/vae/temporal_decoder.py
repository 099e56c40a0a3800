"""The autoencoder of Stable Video Diffusion (Blattmann et al. 2023, arXiv:2311.15127), with its published names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.models.vae.autoencoder_kl import DOWN_BLOCKS, Encoder
from opensora.models.vae.blocks import Level, MidBlock, ResidualBlock

GROUPS = 32  # of all group norms


class TemporalResidualBlock(ResidualBlock):
    """[1, C, T, H, W] -> the same shape: a residual block along time, its group norms over all frames."""

    eps = 1e-5

    @staticmethod
    def convolution(in_channels: int, out_channels: int) -> nn.Module:
        return nn.Conv3d(in_channels, out_channels, (3, 1, 1), padding=(1, 0, 0))


class TimeMixer(nn.Module):
    """Learned mix of the result without and with the temporal block; starts as their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.zeros(1))

    def forward(self, spatial: Tensor, temporal: Tensor) -> Tensor:
        return torch.lerp(spatial, temporal, torch.sigmoid(self.mix_factor))


class SpatioTemporalBlock(nn.Module):
    """Frames [T, C, H, W] of one video -> [T, O, H, W]: a residual block per frame, then one along time, mixed in."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.spatial_res_block = ResidualBlock(in_channels, out_channels, GROUPS)
        self.temporal_res_block = TemporalResidualBlock(out_channels, out_channels, GROUPS)
        self.time_mixer = TimeMixer()

    def forward(self, x: Tensor) -> Tensor:
        spatial = as_video(self.spatial_res_block(x))
        return as_frames(self.time_mixer(spatial, self.temporal_res_block(spatial)))


class TemporalDecoder(nn.Module):
    """Latents [T, latent_channels, H, W] of one video -> frames [T, C, H * 8, W * 8] for four levels."""

    def __init__(self, latent_channels: int, out_channels: int, widths: Sequence[int], layers: int) -> None:
        super().__init__()
        before = widths[-1]
        self.conv_in = nn.Conv2d(latent_channels, before, 3, padding=1)
        self.mid_block = MidBlock([SpatioTemporalBlock(before, before) for _ in range(layers)], before, GROUPS)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(reversed(widths)):
            resnets = [SpatioTemporalBlock(before if j == 0 else width, width) for j in range(layers + 1)]
            self.up_blocks.append(Level(resnets, width, GROUPS, up=i + 1 < len(widths)))
            before = width
        self.conv_norm_out = nn.GroupNorm(GROUPS, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, out_channels, 3, padding=1)
        self.time_conv_out = nn.Conv3d(out_channels, out_channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return as_frames(self.time_conv_out(as_video(x)))


class AutoencoderKLTemporalDecoder(nn.Module):
    """Encodes frame by frame, decodes the frames of a video together. Arguments as in the published config.json."""

    def __init__(
        self, in_channels: int, out_channels: int, latent_channels: int, layers_per_block: int,
        block_out_channels: Sequence[int], down_block_types: Sequence[str],
    ) -> None:  # fmt: skip
        super().__init__()
        down = [DOWN_BLOCKS[name] for name in down_block_types]
        self.encoder = Encoder(in_channels, latent_channels, block_out_channels, layers_per_block, down, GROUPS)
        self.decoder = TemporalDecoder(latent_channels, out_channels, block_out_channels, layers_per_block)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Mean and log variance [N, 2 * latent_channels, H / 8, W / 8] of frames [N, C, H, W]."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Frames [T, C, H * 8, W * 8] of latents [T, latent_channels, H, W] of one video."""
        return self.decoder(z)


def as_video(frames: Tensor) -> Tensor:
    """[T, C, H, W] as [1, C, T, H, W]."""
    return frames.transpose(0, 1).unsqueeze(0)


def as_frames(video: Tensor) -> Tensor:
    """[1, C, T, H, W] as [T, C, H, W]."""
    return video.squeeze(0).transpose(0, 1)
