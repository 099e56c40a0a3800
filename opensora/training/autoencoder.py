"""Training of the video autoencoder, one stage at a time as in the published recipe: frames first, then time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora import registry
from opensora.acceleration.device import keep_allocations_in_heap, pick_device, place
from opensora.checkpoints import builder
from opensora.checkpoints.fit import load_weights
from opensora.checkpoints.hub import read_config_json
from opensora.checkpoints.save import save_pretrained
from opensora.config.settings import NOT_YET_IN_VAE_TRAINING, TrainSettings, check_trainable
from opensora.datasets.synthetic.dataset import MixedClips, shape_clips
from opensora.distributed.fsdp import world_size
from opensora.errors import ConfigError
from opensora.models.vae.posterior import DiagonalGaussian
from opensora.models.vae.vae import SPATIAL_SCALE, VideoAutoencoderPipeline
from opensora.training.checkpoint.fingerprint import fingerprint
from opensora.training.run_folder import publish, refuse_a_second
from opensora.training.trainer import Loss, Trainer, step_generator

Videos = Callable[[int], Tensor]  # step -> [B, 3, T, H, W] in [-1, 1]
STATISTICS_CLIPS = 256
PIXEL_FRAMES = 4
LATENT_SHARE = 0.05  # of errors of latents, beside those of pixels: with more of it wrong colours came to stay


def reconstruction(decoded: Tensor, target: Tensor) -> Tensor:
    """Mean absolute plus mean squared error: sharp edges and exact colours."""
    difference = decoded.float() - target
    return difference.abs().mean() + difference.square().mean()


def frame_loss(model: VideoAutoencoderPipeline, settings: TrainSettings, videos: Videos) -> Loss:
    """The per-frame autoencoder alone: reconstruction + kl_loss_weight * KL per frame."""

    def loss(step: int, generator: torch.Generator) -> Tensor:
        frames = videos(step).transpose(1, 2).flatten(0, 1)  # [B * T, 3, H, W]
        posterior = DiagonalGaussian(model.spatial_vae.moments(frames).float())
        decoded = model.spatial_vae.decode_frames(posterior.sample(generator) * SPATIAL_SCALE)
        return reconstruction(decoded, frames) + settings.kl_loss_weight * posterior.kl().mean()

    return loss


def video_loss(model: VideoAutoencoderPipeline, settings: TrainSettings, videos: Videos, period: int | None) -> Loss:
    """The temporal autoencoder: errors of the per-frame latents (use_z_rec_loss) and of pixels (use_real_rec_loss).

    Where the per-frame encoder is frozen and the clips repeat after `period` steps, its latents are computed once.
    Pixels are compared in a few random frames of each clip: more clips a step teach more than all frames of one.
    """

    def spatial(step: int) -> Tensor:
        return model.spatial_vae.encode(videos(step), sample=False).float()

    frozen = not any(p.requires_grad for p in model.spatial_vae.module.encoder.parameters())
    remembered = cache(spatial)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        x_z = remembered(step % period) if frozen and period else spatial(step)
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


def decoder_loss(model: VideoAutoencoderPipeline, videos: Videos) -> Loss:
    """The decoders alone, so that latents keep their meaning: per-frame latents of whole clips, pixels of some frames.

    Those are frames in a row, compared also in what changes from one to the next, often across the border of chunks.
    What is decoded must be encoded as the same latents again: long videos are decoded and encoded once for each loop.
    """

    def loss(step: int, generator: torch.Generator) -> Tensor:
        x = videos(step)
        with torch.no_grad():
            x_z = model.spatial_vae.encode(x, sample=False).float()
            z = model.encode_time(x_z, sample=False)[0].float()
        decoded_x_z = model.decode_time(z, x.shape[2])
        some = in_a_row(x.shape[2], model.micro_frame_size, generator)
        decoded, target = model.spatial_vae.decode(decoded_x_z[:, :, some]), x[:, :, some]
        latents = reconstruction(decoded_x_z, x_z) / SPATIAL_SCALE
        latents = latents + reconstruction(model.spatial_vae.encode(decoded, False), x_z[:, :, some]) / SPATIAL_SCALE
        latents = latents + reconstruction(model.encode_time(decoded_x_z, False)[0], z)
        total = reconstruction(decoded, target) + LATENT_SHARE * latents
        return total if x.shape[2] == 1 else total + reconstruction(decoded.diff(dim=2), target.diff(dim=2))

    return loss


def in_a_row(frames: int, chunk: int | None, generator: torch.Generator) -> slice:
    """PIXEL_FRAMES frames of a clip: half of the time those around the end of its first chunk, if there are more."""
    starts = max(frames - PIXEL_FRAMES, 0) + 1
    start = int(torch.randint(2 * starts, (), generator=generator))
    if start >= starts:
        start = chunk - PIXEL_FRAMES // 2 if chunk and chunk + PIXEL_FRAMES // 2 <= frames else start - starts
    return slice(start, start + PIXEL_FRAMES)


def train_vae(settings: TrainSettings) -> Path:
    """Trains as the settings say; returns the folder of the averaged model, written once the last step is done.

    The per-frame part is trained alone unless use_z_rec_loss or use_real_rec_loss ask for the temporal one; after
    that one, shift and scale are set so that latents have mean 0 and deviation 1, unless they were set before. With
    freeze_encoders the decoders of both parts are trained, and nothing else.
    """
    check_trainable(settings, NOT_YET_IN_VAE_TRAINING)
    if world_size() > 1:
        raise ConfigError("an autoencoder is trained on one rank; start it without torchrun")
    if settings.perceptual_loss_weight:
        raise ConfigError("perceptual_loss_weight needs the weights of a perceptual network; set it to 0")
    refuse_a_second(settings)
    keep_allocations_in_heap()
    device = pick_device(settings.device)
    torch.manual_seed(settings.seed)
    model = _build(settings.model, settings.offline)
    temporal = settings.use_z_rec_loss or settings.use_real_rec_loss
    _freeze(model, settings, temporal)
    model = place(model, device).train()
    data = shape_clips(settings.dataset, settings.batch_size or 1, settings.seed)
    videos = _mixed(settings, data, device)
    if settings.freeze_encoders:
        loss = decoder_loss(model, videos)
    else:
        loss = video_loss(model, settings, videos, data.period) if temporal else frame_loss(model, settings, videos)
    prints = fingerprint(settings, **{"steps of an epoch": str(max(settings.ckpt_every, 1))})
    trainer = Trainer(settings, model, loss, device, settings.ckpt_every, prints=prints)
    folder = trainer.run()
    if not trainer.finished:
        return folder
    model.load_state_dict(trainer.ema.state_dict())
    if temporal and model.shift.ndim == 0:  # a later stage keeps the latents as they are
        _normalise(model.eval(), data, device)
    config = {"model_type": settings.model["type"], **model.config}
    save_pretrained(model.state_dict(), trainer.folder / "ema", config)
    return publish(trainer.folder)


def _freeze(model: VideoAutoencoderPipeline, settings: TrainSettings, temporal: bool) -> None:
    """Leaves alone what this stage does not train."""
    if settings.freeze_encoders:
        if not settings.model.get("from_pretrained"):
            raise ConfigError(
                "freeze_encoders keeps the latents of trained encoders; name their weights with --ckpt-path"
            )
        model.requires_grad_(False)
        for part in (model.spatial_vae.module, model.temporal_vae):
            for decoder in (part.post_quant_conv, part.decoder):
                decoder.requires_grad_(True)
        return
    freeze = settings.model.get("freeze_vae_2d", False)
    (model.spatial_vae if temporal else model.temporal_vae).requires_grad_(temporal and not freeze)


def _build(section: dict[str, Any], offline: bool) -> VideoAutoencoderPipeline:
    """The autoencoder of the settings, with the weights, shift and scale of the checkpoint that it starts from.

    Without one its parts start from those that their own sections name.
    """
    path = builder.locate_weights(section, "model", offline) if section.get("from_pretrained") else None
    parts = {} if path else _parts(section, offline)
    stated = read_config_json(path) if path else {}
    model = registry.build({**{name: stated[name] for name in ("shift", "scale") if name in stated}, **section})
    if path:
        print(load_weights(model, path))
    for name, found in parts.items():
        print(load_weights(model.spatial_vae if name == "vae_2d" else model.temporal_vae, found))
    return model


def _parts(section: dict[str, Any], offline: bool) -> dict[str, Path]:
    """Where the weights of the parts lie, of those that name any."""
    own = {name: section.get(name) for name in ("vae_2d", "vae_temporal")}
    named = {name: one for name, one in own.items() if isinstance(one, dict) and one.get("from_pretrained")}
    return {name: builder.locate_weights(one, name, offline) for name, one in named.items()}


def _mixed(settings: TrainSettings, data: MixedClips, device: torch.device) -> Videos:
    """The clips of a step, with mixed_strategy cut at times; they repeat as those of `data` do.

    "mixed_video_image" leaves their first frame, in mixed_image_ratio of the steps; "mixed_video_random" any number of
    frames, one to all.
    """
    image_ratio = settings.mixed_image_ratio if settings.mixed_strategy == "mixed_video_image" else 0.0

    def videos(step: int) -> Tensor:
        step = step % data.period if data.period else step
        x = data.videos(step).to(device)  # [B, 3, T, H, W]
        chance = torch.rand((), generator=step_generator(settings.seed + 1, step)).item()
        if settings.mixed_strategy == "mixed_video_random":
            return x[:, :, : 1 + int(chance * x.shape[2])]
        return x[:, :, :1] if chance < image_ratio else x

    return videos


@torch.no_grad()
def _normalise(model: VideoAutoencoderPipeline, data: MixedClips, device: torch.device) -> None:
    """Sets shift and scale to the mean and deviation of each latent channel over the first clips."""
    batches = range(-(-STATISTICS_CLIPS // data.sets[0].batch_size))
    z = torch.cat([model.encode(data.videos(step).to(device), sample=False).float() for step in batches])
    model.shift = z.mean(dim=(0, 2, 3, 4)).view(1, -1, 1, 1, 1)
    model.scale = z.std(dim=(0, 2, 3, 4)).view(1, -1, 1, 1, 1)
    model.config |= {"shift": model.shift.flatten().tolist(), "scale": model.scale.flatten().tolist()}
