"""The losses of the three training stages of the video autoencoder: frames, time, and decoders alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from opensora.config.settings import TrainSettings
from opensora.models.vae.posterior import DiagonalGaussian
from opensora.models.vae.vae import SPATIAL_SCALE, VideoAutoencoderPipeline

AutoencoderLoss = Callable[[int, torch.Generator], Tensor]  # step -> scalar
Videos = Callable[[int], Tensor]  # step -> [B, 3, T, H, W] in [-1, 1]
PIXEL_FRAMES = 4
LATENT_WEIGHT = 0.05  # of latent errors beside pixel errors: with more, colors drifted for good


def reconstruction(decoded: Tensor, target: Tensor) -> Tensor:
    """Mean absolute plus mean squared error: sharp edges and exact colors."""
    return per_clip(decoded, target).mean()


def per_clip(decoded: Tensor, target: Tensor) -> Tensor:
    """The same of each clip, [B]."""
    difference = (decoded.float() - target).flatten(1)
    return difference.abs().mean(1) + difference.square().mean(1)


def frame_loss(model: VideoAutoencoderPipeline, settings: TrainSettings, videos: Videos) -> AutoencoderLoss:
    """Of the per-frame autoencoder: reconstruction + kl_loss_weight * KL per frame."""

    def loss(step: int, generator: torch.Generator) -> Tensor:
        frames = videos(step).transpose(1, 2).flatten(0, 1)  # [B * T, 3, H, W]
        posterior = DiagonalGaussian(model.spatial_vae.moments(frames).float())
        decoded = model.spatial_vae.decode_frames(posterior.sample(generator) * SPATIAL_SCALE)
        return reconstruction(decoded, frames) + settings.kl_loss_weight * posterior.kl().mean()

    return loss


def video_loss(
    model: VideoAutoencoderPipeline, settings: TrainSettings, videos: Videos, period: int | None
) -> AutoencoderLoss:
    """Of the temporal autoencoder: errors of per-frame latents (use_z_rec_loss) and of pixels (use_real_rec_loss).

    If the per-frame encoder is frozen and the clips repeat after `period` steps, its latents are computed once. Pixels
    are compared in PIXEL_FRAMES random frames of each clip: more clips per step teach more than all frames of one.
    """

    def spatial(step: int) -> Tensor:
        return model.spatial_vae.encode(videos(step), sample=False).float()

    frozen = not any(p.requires_grad for p in model.spatial_vae.module.encoder.parameters())
    cached = cache(spatial)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        x_z = cached(step % period) if frozen and period else spatial(step)
        posterior = model.temporal_vae.encode(x_z)
        posterior = DiagonalGaussian(torch.cat((posterior.mean, posterior.logvar), dim=1).float())
        decoded_x_z = model.temporal_vae.decode(posterior.sample(generator), num_frames=x_z.shape[2])
        total = settings.kl_loss_weight * posterior.kl().mean()
        if settings.use_z_rec_loss:
            total = total + reconstruction(decoded_x_z, x_z) / SPATIAL_SCALE
        if settings.use_real_rec_loss:
            some = torch.randperm(x_z.shape[2], generator=generator)[:PIXEL_FRAMES]
            total = total + reconstruction(model.spatial_vae.decode(decoded_x_z[:, :, some]), videos(step)[:, :, some])
        return total

    return loss


def decoder_loss(
    model: VideoAutoencoderPipeline, settings: TrainSettings, videos: Videos, period: int | None
) -> AutoencoderLoss:
    """Of the decoders alone, so that latents keep their meaning: per-frame latents of whole clips, pixels of some.

    Pixels are compared in consecutive frames, and in their differences over time, often across the border of chunks.
    The decoded video must encode to the same latents: long videos are decoded and encoded once per loop. The decoders
    get latents with noise of a random deviation up to latent_noise, so that they restore what a diffusion model makes
    (noise-augmented decoding, Zheng et al. 2025, arXiv:2510.11690). The loss of a batch is the root mean square of
    those of its clips: colors waver in the few that are far worse than the rest. Latents of clips that repeat after
    `period` steps are computed once.
    """

    @torch.no_grad()
    def encode(step: int) -> tuple[Tensor, Tensor]:
        x_z = model.spatial_vae.encode(videos(step), sample=False).float()
        return x_z, model.encode_time(x_z, sample=False)[0].float()

    cached = cache(encode)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        x = videos(step)
        x_z, z = cached(step % period) if period else encode(step)
        decoded_x_z = model.decode_time(add_random_noise(z, settings.latent_noise, generator), x.shape[2])
        some = consecutive_frames(x.shape[2], model.micro_frame_size, generator)
        decoded, target = model.spatial_vae.decode(decoded_x_z[:, :, some]), x[:, :, some]
        latents = per_clip(decoded_x_z, x_z) / SPATIAL_SCALE
        latents = latents + per_clip(model.spatial_vae.encode(decoded, False), x_z[:, :, some]) / SPATIAL_SCALE
        latents = latents + per_clip(model.encode_time(decoded_x_z, False)[0], z)
        total = per_clip(decoded, target) + LATENT_WEIGHT * latents
        if x.shape[2] > 1:
            total = total + per_clip(decoded.diff(dim=2), target.diff(dim=2))
        return total.square().mean().sqrt()

    return loss


def add_random_noise(z: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Latents `z` [B, C, T, H, W] with normal noise, of a deviation that is uniform in [0, most) for each clip."""
    if not most:
        return z
    deviation = most * torch.rand(len(z), 1, 1, 1, 1, generator=generator)
    return z + (deviation * torch.randn(z.shape, generator=generator)).to(z)


def consecutive_frames(frames: int, chunk: int | None, generator: torch.Generator) -> slice:
    """PIXEL_FRAMES consecutive frames of a clip; half of the time those around the end of its first chunk, if any."""
    starts = max(frames - PIXEL_FRAMES, 0) + 1
    start = int(torch.randint(2 * starts, (), generator=generator))
    if start >= starts:
        start = chunk - PIXEL_FRAMES // 2 if chunk and chunk + PIXEL_FRAMES // 2 <= frames else start - starts
    return slice(start, start + PIXEL_FRAMES)
