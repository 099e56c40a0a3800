"""Training of a diffusion transformer on pre-encoded clips with the rectified-flow loss."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from opensora import components, registry, weights
from opensora.acceleration.device import keep_allocations_in_heap, pick_device, place, training_context
from opensora.datasets.shape_clips import shape_clips, to_model
from opensora.errors import ConfigError
from opensora.models.text_encoder.cleaning import preprocess
from opensora.settings import TrainSettings, check_trainable
from opensora.training.features import Features, encode_once
from opensora.training.trainer import Loss, Trainer

ENCODE_BATCH = 20


def train(settings: TrainSettings) -> Path:
    """Trains as the settings say; returns the last checkpoint, or the averaged model's folder once all is done."""
    check_trainable(settings)
    if settings.scheduler is None or settings.batch_size is None:
        raise ConfigError("training a diffusion model needs a scheduler and a batch_size")
    keep_allocations_in_heap()
    device = pick_device(settings.device)
    features = _features(settings, device)
    torch.manual_seed(settings.seed)
    model = registry.build(settings.model)
    if source := settings.model.get("from_pretrained"):
        print(weights.load_weights(model, source))
    model = place(model, device).train()
    if settings.compile:
        model.compile()
    batches = Batches(features, settings.batch_size, settings.seed, device)
    loss = flow_loss(model, settings, batches)
    trainer = Trainer(settings, model, loss, device, batches.per_epoch)
    folder = trainer.run()
    if trainer.step < trainer.total_steps:
        return folder
    final = Path(settings.outputs) / "ema"
    trained = [[settings.dataset["num_frames"], *settings.dataset["image_size"]]]
    config = {"model_type": settings.model["type"], **model.config, "trained_sizes": trained}
    weights.save_pretrained(trainer.ema.state_dict(), final, config)
    return final


class Batches:
    """Batch n of the endless sequence of shuffled epochs, as a function of n."""

    def __init__(self, features: Features, batch_size: int, seed: int, device: torch.device) -> None:
        self.features, self.batch_size, self.seed, self.device = features, batch_size, seed, device
        self.per_epoch = len(features.latents) // batch_size
        if self.per_epoch == 0:
            clips = len(features.latents)
            raise ConfigError(f"{clips} clips do not fill one batch of {batch_size}: there would be no training step")

    def __call__(self, step: int) -> Features:
        epoch, position = divmod(step, self.per_epoch)
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        order = torch.randperm(len(self.features.latents), generator=generator)
        rows = order[position * self.batch_size : (position + 1) * self.batch_size]
        return Features(*(tensor[rows].to(self.device) for tensor in self.features))


def flow_loss(model: nn.Module, settings: TrainSettings, batches: Batches) -> Loss:
    """The rectified-flow loss of a step's batch; text is dropped with the model's class_dropout_prob."""
    scheduler = registry.build(settings.scheduler)
    dataset = settings.dataset
    height, width = dataset["image_size"]
    told = {"fps": dataset.get("fps", 24), "height": height, "width": width}
    size = {"height": height, "width": width, "num_frames": dataset["num_frames"]}

    def loss(step: int, generator: torch.Generator) -> Tensor:
        batch = batches(step)
        text = batch.text.float()[:, None]  # [B, 1, L, C_text]
        drop = torch.rand(len(text), generator=generator) < model.class_dropout_prob
        text = torch.where(drop.to(text.device)[:, None, None, None], model.null_caption(text), text)
        cond = {name: torch.full((len(text),), float(value), device=text.device) for name, value in told.items()}
        cond |= {"y": text, "mask": batch.mask}
        return scheduler.training_loss(model, batch.latents.float(), cond, **size, generator=generator).mean()

    return loss


def _features(settings: TrainSettings, device: torch.device) -> Features:
    """The data set's latents and text, encoded by the frozen autoencoder and text encoder of the settings."""
    dataset = settings.dataset or {}
    clips = shape_clips(dataset, ENCODE_BATCH, dataset.get("seed", 0), "features", "num_clips")
    for name in ("vae", "text_encoder"):
        if getattr(settings, name) is None:
            raise ConfigError(f"training a diffusion model needs a section {name}")
    how = (device, torch.float32, settings.offline)
    vae, vae_summary = components.load(settings.vae, "vae", *how)
    text_encoder, text_summary = components.load(settings.text_encoder, "text_encoder", *how)
    identity = {
        "clips": {"frames": clips.num_frames, "image_size": clips.image_size, "seed": clips.seed},
        "vae": vae_summary.sha256,
        "text_encoder": text_summary.sha256,
        "model_max_length": text_encoder.model_max_length,
        "dtype": settings.dtype,
    }

    @torch.no_grad()
    def encode(indices: range) -> dict[str, Tensor]:
        made = [clips.clip(index) for index in indices]
        videos = to_model([clip.video for clip in made])
        with training_context(device, settings.dtype):
            parts = [vae.encode(part.to(device), sample=False).cpu() for part in videos.split(ENCODE_BATCH)]
        text, mask = text_encoder.encode([preprocess(clip.text) for clip in made])
        room = text_encoder.model_max_length - mask.shape[1]
        return {
            "latents": torch.cat(parts).half(),
            "text": nn.functional.pad(text[:, 0].half().cpu(), (0, 0, 0, room)),
            "mask": nn.functional.pad(mask.cpu(), (0, room)),
        }

    return encode_once(Path(dataset["features"]), dataset["num_clips"], identity, encode)
