"""Training of the video autoencoder, one stage at a time as in the published recipe: frames first, then time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora import registry
from opensora.acceleration.device import pick_device
from opensora.acceleration.placement import to_device
from opensora.checkpoints import builder
from opensora.checkpoints.fit import load_weights
from opensora.checkpoints.hub import read_config_json
from opensora.checkpoints.save import save_pretrained
from opensora.config.settings import NOT_YET_IN_VAE_TRAINING, TrainSettings, check_trainable
from opensora.datasets.synthetic.ahead import VideosAhead
from opensora.datasets.synthetic.dataset import MixedClips, rendered_clips
from opensora.distributed.ranks import world_size
from opensora.errors import ConfigError
from opensora.models.vae.vae import VideoAutoencoderPipeline
from opensora.training.checkpoint.fingerprint import fingerprint
from opensora.training.losses.autoencoder import AutoencoderLoss, Videos, decoder_loss, frame_loss, video_loss
from opensora.training.restoration import LatentRestorer
from opensora.training.result import TrainResult
from opensora.training.run_folder import publish, refuse_running
from opensora.training.step import step_generator
from opensora.training.trainer import Trainer

STATISTICS_CLIPS = 256  # whose latents set shift and scale


def train_vae(settings: TrainSettings) -> TrainResult:
    """Trains a video autoencoder; exports the averaged weights once the last step is done.

    Trains the per-frame part alone, unless use_z_rec_loss or use_real_rec_loss ask for the temporal part; after that
    one, sets shift and scale so that latents have mean 0 and deviation 1, unless they were set before. With
    freeze_encoders, trains the decoders of both parts alone. Raises ConfigError, WeightsError and OpenSoraError.
    """
    check_trainable(settings, NOT_YET_IN_VAE_TRAINING)
    if settings.input_perturbation:
        raise ConfigError("input_perturbation is for training diffusion models; remove it")
    if world_size() > 1:
        raise ConfigError("an autoencoder is trained on one rank; start it without torchrun")
    if settings.perceptual_loss_weight:
        raise ConfigError("perceptual_loss_weight needs the weights of a perceptual network; set it to 0")
    refuse_running(settings)
    device = pick_device(settings.device)
    torch.manual_seed(settings.seed)
    model = _build(settings.model, settings.offline)
    temporal = settings.use_z_rec_loss or settings.use_real_rec_loss
    _freeze(model, settings, temporal)
    model = to_device(model, device).train()
    data = rendered_clips(settings.dataset, settings.batch_size or 1, settings.seed)
    restore = LatentRestorer(settings, data, model, device) if settings.restorer else None
    loss = _loss(settings, model, _mixed(settings, data, device), data.period, temporal, restore)
    contents = restore.contents if restore else {}
    identity = fingerprint(settings, **{"steps of an epoch": str(max(settings.ckpt_every, 1))}, **contents)
    trainer = Trainer(settings, model, loss, device, settings.ckpt_every, fingerprint=identity)
    checkpoint = trainer.run()
    if not trainer.finished:
        return TrainResult(trainer.folder, trainer.step, checkpoint)
    model.load_state_dict(trainer.ema.state_dict())
    if temporal and model.shift.ndim == 0:  # a later stage keeps the latents as they are
        _normalize(model.eval(), data, device)
    config = {"model_type": settings.model["type"], **model.config}
    save_pretrained(model.state_dict(), trainer.folder / "ema", config)
    return TrainResult(trainer.folder, trainer.step, checkpoint, publish(trainer.folder))


def _loss(
    settings: TrainSettings, model: VideoAutoencoderPipeline, videos: Videos, period: int | None, temporal: bool,
    restore: LatentRestorer | None,
) -> AutoencoderLoss:  # fmt: skip
    """The loss of the stage that the settings ask for; the clips repeat after `period` steps."""
    if settings.freeze_encoders:
        return decoder_loss(model, settings, videos, period, restore)
    return video_loss(model, settings, videos, period) if temporal else frame_loss(model, settings, videos)


def _freeze(model: VideoAutoencoderPipeline, settings: TrainSettings, temporal: bool) -> None:
    """Freezes what this stage does not train."""
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
    """The autoencoder with the weights, shift and scale of its checkpoint, or the weights of its parts' checkpoints.

    A section that gives one number as shift or scale takes those of the checkpoint's channels away: they are measured
    anew, for latents that are to change.
    """
    path = builder.locate_weights(section, "model", offline) if section.get("from_pretrained") else None
    parts = {} if path else _parts(section, offline)
    stated = read_config_json(path) if path else {}
    stated = {name: stated[name] for name in ("shift", "scale") if name in stated}
    given = {name: section[name] for name in stated if isinstance(section.get(name), int | float)}
    model = registry.build({**stated, **section, **{name: stated[name] for name in given}})
    if path:
        print(load_weights(model, path))
    if given:
        model.set_normalization(**{"shift": 0.0, "scale": 1.0, **given})
    for name, found in parts.items():
        print(load_weights(model.spatial_vae if name == "vae_2d" else model.temporal_vae, found))
    return model


def _parts(section: dict[str, Any], offline: bool) -> dict[str, Path]:
    """The checkpoints that the sections of the parts name."""
    own = {name: section.get(name) for name in ("vae_2d", "vae_temporal")}
    named = {name: one for name, one in own.items() if isinstance(one, dict) and one.get("from_pretrained")}
    return {name: builder.locate_weights(one, name, offline) for name, one in named.items()}


def _mixed(settings: TrainSettings, data: MixedClips, device: torch.device) -> Videos:
    """The clips of a step, cut to fewer frames by mixed_strategy.

    "mixed_video_image" keeps the first frame in mixed_image_ratio of the steps; "mixed_video_random" keeps a random
    number of frames.
    """
    image_ratio = settings.mixed_image_ratio if settings.mixed_strategy == "mixed_video_image" else 0.0
    rendered = VideosAhead(data, settings.num_workers if data.slow else 0, device)

    def videos(step: int) -> Tensor:
        step = step % data.period if data.period else step
        x = rendered(step)  # [B, 3, T, H, W]
        chance = torch.rand((), generator=step_generator(settings.seed + 1, step)).item()
        if settings.mixed_strategy == "mixed_video_random":
            return x[:, :, : 1 + int(chance * x.shape[2])]
        return x[:, :, :1] if chance < image_ratio else x

    return videos


@torch.no_grad()
def _normalize(model: VideoAutoencoderPipeline, data: MixedClips, device: torch.device) -> None:
    """Sets shift and scale to the mean and deviation of each latent channel over the first clips."""
    batches = range(-(-STATISTICS_CLIPS // data.sets[0].batch_size))
    z = torch.cat([model.encode(data.videos(step).to(device), sample=False).float() for step in batches])
    model.set_normalization(z.mean(dim=(0, 2, 3, 4)).tolist(), z.std(dim=(0, 2, 3, 4)).tolist())
