"""Latents that a diffusion model learns easily: colors in channels of their own, equal variances, no correlation.

In the embedded model without these losses, a latent's colors depended on all else in its clip, and most of its channels
said the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from opensora.models.vae.vae import SPATIAL_FACTOR, VideoAutoencoderPipeline

COLOR_CHANNELS = 3
LEAST_VARIANCE = 0.02  # of a mixture of red, green and blue, as a part of the largest: scaled up no further


def mean_colors(x: Tensor, model: VideoAutoencoderPipeline) -> Tensor:
    """Mean color [B, 3, T', H / 8, W / 8] of the pixels of x [B, 3, T, H, W] that each latent of `model` stands for."""
    chunks = x.split(model.micro_frame_size or x.shape[2], dim=2)
    return torch.cat([_chunk_means(chunk, model.temporal_vae.time_downsample_factor) for chunk in chunks], dim=2)


def _chunk_means(chunk: Tensor, factor: int) -> Tensor:
    """As `mean_colors`: the first latent stands for fewer frames when `factor` does not divide their number."""
    blocks = F.avg_pool3d(chunk, (1, SPATIAL_FACTOR, SPATIAL_FACTOR))
    first = blocks.shape[2] % factor
    means = [blocks[:, :, :first].mean(dim=2, keepdim=True)] if first else []
    if blocks.shape[2] > first:
        means.append(F.avg_pool3d(blocks[:, :, first:], (factor, 1, 1)))
    return torch.cat(means, dim=2)


class ColorLoss:
    """How far the first three channels of a latent are from its mean color, whitened over the clips `videos`."""

    def __init__(self, videos: Sequence[Tensor], model: VideoAutoencoderPipeline) -> None:
        self.model = model
        colors = torch.cat([mean_colors(x, model).transpose(0, 1).flatten(1) for x in videos], dim=1)  # [3, N]
        variances, directions = torch.linalg.eigh(torch.cov(colors))
        scale = variances.clamp(min=LEAST_VARIANCE * variances.max()).clamp(min=1e-8).rsqrt()
        self.mean, self.whitening = colors.mean(dim=1), scale[:, None] * directions.T

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        """Mean squared error of the latents z [B, C, T', H / 8, W / 8] of x [B, 3, T, H, W]."""
        colors = mean_colors(x, self.model) - self.mean.view(1, -1, 1, 1, 1)
        return (z[:, :COLOR_CHANNELS] - torch.einsum("ij,bj...->bi...", self.whitening, colors)).square().mean()


def statistics_loss(z: Tensor) -> Tensor:
    """How far the channels of z [B, C, ...] are from mean 0, variance 1 and no correlation.

    Squared errors of the means and variances, and squared correlations of pairs, as covariances in VICReg (Bardes et
    al. 2022, arXiv:2105.04906).
    """
    channels = z.transpose(0, 1).flatten(1)  # [C, N]
    mean = channels.mean(dim=1)
    covariance = torch.cov(channels, correction=0)
    variance = covariance.diagonal()
    correlation = covariance / torch.outer(variance, variance).clamp(min=1e-4).sqrt()
    pairs = correlation - correlation.diagonal().diag()
    return mean.square().mean() + (variance - 1).square().mean() + 2 * pairs.square().mean()
