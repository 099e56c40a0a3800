"""The losses of the three training stages of the video autoencoder: frames, time, and decoders alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from opensora.config.settings import TrainSettings
from opensora.models.vae.posterior import DiagonalGaussian
from opensora.models.vae.vae import SPATIAL_SCALE, VideoAutoencoderPipeline
from opensora.training.losses.latents import ColorLoss, statistics_loss

AutoencoderLoss = Callable[[int, torch.Generator], Tensor]  # step -> scalar
Videos = Callable[[int], Tensor]  # step -> [B, 3, T, H, W] in [-1, 1]
Restore = Callable[[int, Tensor, torch.Generator], Tensor]  # step, latents of its clips -> what a model makes of them
PIXEL_FRAMES = 4
COLOR_BATCHES = 16  # of clips whose mean colors are whitened
LATENT_WEIGHT = 0.05  # of latent errors beside pixel errors: with more, colors drifted for good
PER_FRAME_WEIGHT = 0.1  # of errors of per-frame latents beside pixel errors
# Contrast of a frame whose errors count once, least contrast, and the range of weights of power 1
USUAL_CONTRAST, LEAST_CONTRAST, WEIGHTS = 0.25, 0.05, (0.3, 4.0)


def reconstruction(decoded: Tensor, target: Tensor) -> Tensor:
    """Mean absolute plus mean squared error: sharp edges and exact colors."""
    return per_clip(decoded, target).mean()


def per_clip(decoded: Tensor, target: Tensor) -> Tensor:
    """The same of each clip, [B]."""
    difference = (decoded.float() - target).flatten(1)
    return difference.abs().mean(1) + difference.square().mean(1)


def contrast_weights(x: Tensor, power: float = 1.0) -> Tensor:
    """Weights [B, T] of the errors in the frames of x [B, 3, T, H, W]: 1 / contrast to this power, 1 at usual contrast.

    Contrast is the root mean square distance from the median color, which is the background of a drawn frame: low for
    small objects and for colors like the background's.
    """
    background = x.flatten(3).median(dim=3).values[..., None, None]
    contrast = (x - background).square().mean(dim=(1, 3, 4)).sqrt()
    return (USUAL_CONTRAST / contrast.clamp(min=LEAST_CONTRAST)).clamp(*WEIGHTS) ** power


class PixelLoss:
    """Absolute plus squared error of frames, weighted by their contrast if the settings ask for it."""

    def __init__(self, settings: TrainSettings) -> None:
        self.power = settings.contrast_weighting

    def __call__(self, decoded: Tensor, target: Tensor) -> Tensor:
        """Of each clip, [B], for videos [B, 3, T, H, W]."""
        return self._mean(decoded.float() - target, target)

    def changes(self, decoded: Tensor, target: Tensor) -> Tensor:
        """The same for the differences between consecutive frames; 0 for single frames."""
        if target.shape[2] == 1:
            return decoded.new_zeros(len(decoded))
        return self._mean((decoded.float() - target).diff(dim=2), target[:, :, 1:])

    def _mean(self, error: Tensor, target: Tensor) -> Tensor:
        by_frame = error.abs().mean(dim=(1, 3, 4)) + error.square().mean(dim=(1, 3, 4))
        return (by_frame * contrast_weights(target, self.power) if self.power else by_frame).mean(dim=1)

    def of_batch(self, errors: Tensor) -> Tensor:
        """The loss of a batch from the errors [B] of its clips."""
        return root_mean_square(errors) if self.power else errors.mean()


def root_mean_square(losses: Tensor) -> Tensor:
    """The loss of a batch from those of its clips: a few are far worse than the rest, and they are what one sees."""
    return losses.square().mean().sqrt()


def frame_loss(model: VideoAutoencoderPipeline, settings: TrainSettings, videos: Videos) -> AutoencoderLoss:
    """Of the per-frame autoencoder: reconstruction + kl_loss_weight * KL per frame."""
    pixel_loss = PixelLoss(settings)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        frames = videos(step).transpose(1, 2).flatten(0, 1)  # [B * T, 3, H, W]
        posterior = DiagonalGaussian(model.spatial_vae.moments(frames).float())
        decoded = model.spatial_vae.decode_frames(posterior.sample(generator) * SPATIAL_SCALE)
        errors = pixel_loss(decoded[:, :, None], frames[:, :, None])
        return pixel_loss.of_batch(errors) + settings.kl_loss_weight * posterior.kl().mean()

    return loss


def video_loss(
    model: VideoAutoencoderPipeline, settings: TrainSettings, videos: Videos, period: int | None
) -> AutoencoderLoss:
    """Of the temporal autoencoder: errors of per-frame latents (use_z_rec_loss) and of pixels (use_real_rec_loss).

    If the per-frame encoder is frozen and the clips repeat after `period` steps, its latents are computed once. Pixels
    and their changes are compared in PIXEL_FRAMES consecutive frames of each clip: more clips per step teach more than
    all frames of one. The decoder gets latents with noise of a random deviation up to latent_noise, which keeps apart
    what it must tell apart.
    """

    def spatial(step: int) -> Tensor:
        return model.spatial_vae.encode(videos(step), sample=False).float()

    frozen = not any(p.requires_grad for p in model.spatial_vae.module.encoder.parameters())
    cached = cache(spatial)
    pixel_loss = PixelLoss(settings)
    color_loss = None
    if settings.mean_color_loss_weight:
        color_loss = ColorLoss([videos(step) for step in range(COLOR_BATCHES)], model)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        x_z = cached(step % period) if frozen and period else spatial(step)
        posterior = model.temporal_vae.encode(x_z)
        posterior = DiagonalGaussian(torch.cat((posterior.mean, posterior.logvar), dim=1).float())
        z = add_random_noise(posterior.sample(generator), settings.latent_noise, generator)
        decoded_x_z = model.temporal_vae.decode(z, num_frames=x_z.shape[2])
        total = settings.kl_loss_weight * posterior.kl().mean()
        if settings.use_z_rec_loss:
            weight = PER_FRAME_WEIGHT if settings.use_real_rec_loss else 1.0
            total = total + weight * reconstruction(decoded_x_z, x_z) / SPATIAL_SCALE
        if settings.use_real_rec_loss:
            some = consecutive_frames(x_z.shape[2], model.micro_frame_size, generator)
            decoded, target = model.spatial_vae.decode(decoded_x_z[:, :, some]), videos(step)[:, :, some]
            total = total + pixel_loss.of_batch(pixel_loss(decoded, target) + pixel_loss.changes(decoded, target))
        if color_loss:
            total = total + settings.mean_color_loss_weight * color_loss(posterior.mean, videos(step))
        if settings.latent_statistics_loss_weight:
            total = total + settings.latent_statistics_loss_weight * statistics_loss(posterior.mean)
        return total

    return loss


def decoder_loss(
    model: VideoAutoencoderPipeline, settings: TrainSettings, videos: Videos, period: int | None,
    restore: Restore | None = None,
) -> AutoencoderLoss:  # fmt: skip
    """Of the decoders alone, so that latents keep their meaning: per-frame latents of whole clips, pixels of some.

    Pixels are compared in consecutive frames, and in their differences over time, often across the border of chunks.
    The decoded video must encode to the same latents: long videos are decoded and encoded once per loop. The decoders
    get the latents that `restore` makes, with noise of a random deviation up to latent_noise, so that they stand what
    is wrong in a diffusion model's latents (noise-augmented decoding, Zheng et al. 2025, arXiv:2510.11690). The loss of
    a batch is the root mean square of those of its clips: colors waver in the few that are far worse than the rest.
    Latents of clips that repeat after `period` steps are computed once.
    """
    pixel_loss = PixelLoss(settings)

    @torch.no_grad()
    def encode(step: int) -> tuple[Tensor, Tensor]:
        x_z = model.spatial_vae.encode(videos(step), sample=False).float()
        return x_z, model.encode_time(x_z, sample=False)[0].float()

    cached = cache(encode)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        x = videos(step)
        x_z, z = cached(step % period) if period else encode(step)
        made = restore(step, z, generator) if restore else z
        decoded_x_z = model.decode_time(add_random_noise(made, settings.latent_noise, generator), x.shape[2])
        some = consecutive_frames(x.shape[2], model.micro_frame_size, generator)
        decoded, target = model.spatial_vae.decode(decoded_x_z[:, :, some]), x[:, :, some]
        latents = per_clip(decoded_x_z, x_z) / SPATIAL_SCALE
        latents = latents + per_clip(model.spatial_vae.encode(decoded, False), x_z[:, :, some]) / SPATIAL_SCALE
        latents = latents + per_clip(model.encode_time(decoded_x_z, False)[0], z)
        changes = pixel_loss.changes(decoded, target)
        return root_mean_square(pixel_loss(decoded, target) + changes + LATENT_WEIGHT * latents)

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
