"""The autoencoder of Stable Diffusion and SDXL (Rombach et al. 2022, arXiv:2112.10752), with its published names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from opensora.models.vae.blocks import ACTIVATIONS, Activation, Level, MidBlock, ResidualBlock

DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}  # published name -> has attention
UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


class Encoder(nn.Module):
    """Images [N, C, H, W] -> [N, 2 * latent_channels, H / 8, W / 8] for four levels: each but the last one halves."""

    def __init__(
        self, in_channels: int, latent_channels: int, widths: Sequence[int], layers: int, attends: Sequence[bool],
        groups: int = 32, activation: Activation = F.silu, mid_attention: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        before = widths[0]
        for i, width in enumerate(widths):
            resnets = [ResidualBlock(before if j == 0 else width, width, groups, activation) for j in range(layers)]
            self.down_blocks.append(Level(resnets, width, groups, attends[i], down=i + 1 < len(widths)))
            before = width
        resnets = [ResidualBlock(before, before, groups, activation) for _ in range(2)]
        self.mid_block = MidBlock(resnets, before, groups, mid_attention)
        self.conv_norm_out = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents [N, latent_channels, H, W] -> images [N, C, H * 8, W * 8] for four levels: the encoder backwards."""

    def __init__(
        self, latent_channels: int, out_channels: int, widths: Sequence[int], layers: int, attends: Sequence[bool],
        groups: int = 32, activation: Activation = F.silu, mid_attention: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        before = widths[-1]
        self.conv_in = nn.Conv2d(latent_channels, before, 3, padding=1)
        self.up_blocks = nn.ModuleList()
        resnets = [ResidualBlock(before, before, groups, activation) for _ in range(2)]
        self.mid_block = MidBlock(resnets, before, groups, mid_attention)
        for i, width in enumerate(reversed(widths)):
            resnets = [ResidualBlock(before if j == 0 else width, width, groups, activation) for j in range(layers + 1)]
            self.up_blocks.append(Level(resnets, width, groups, attends[i], up=i + 1 < len(widths)))
            before = width
        self.conv_norm_out = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder and decoder with 1 x 1 convolutions around the latent. Arguments are those of the published config.json.

    Raises KeyError for a block type or activation that is not known; sections are checked before.
    """

    def __init__(
        self, in_channels: int, out_channels: int, latent_channels: int, layers_per_block: int,
        block_out_channels: Sequence[int], down_block_types: Sequence[str], up_block_types: Sequence[str],
        act_fn: str, norm_num_groups: int, mid_block_add_attention: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        style = (norm_num_groups, ACTIVATIONS[act_fn], mid_block_add_attention)
        down, up = [DOWN_BLOCKS[name] for name in down_block_types], [UP_BLOCKS[name] for name in up_block_types]
        self.encoder = Encoder(in_channels, latent_channels, block_out_channels, layers_per_block, down, *style)
        self.decoder = Decoder(latent_channels, out_channels, block_out_channels, layers_per_block, up, *style)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Mean and log variance [N, 2 * latent_channels, H / 8, W / 8] of images [N, C, H, W]."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Images [N, C, H * 8, W * 8] of latents [N, latent_channels, H, W]."""
        return self.decoder(self.post_quant_conv(z))
