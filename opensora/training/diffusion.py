"""Training of a diffusion transformer on pre-encoded clips with the rectified-flow loss."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora import components, registry, weights
from opensora.acceleration.device import keep_allocations_in_heap, pick_device, place, training_context
from opensora.datasets.shape_clips import MixedClips, ShapeClips, shape_clips, to_model
from opensora.errors import ConfigError
from opensora.models.sizes import size_conditioning
from opensora.models.text_encoder.cleaning import preprocess
from opensora.settings import TrainSettings, check_trainable
from opensora.training.features import Features, encode_once
from opensora.training.masks import MaskRatios
from opensora.training.trainer import Loss, Trainer

ENCODE_BATCH = 20


def train(settings: TrainSettings) -> Path:
    """Trains as the settings say; returns the last checkpoint, or the averaged model's folder once all is done."""
    check_trainable(settings)
    if settings.scheduler is None or settings.batch_size is None:
        raise ConfigError("training a diffusion model needs a scheduler and a batch_size")
    ratios = None if settings.mask_ratios is None else MaskRatios(settings.mask_ratios)
    keep_allocations_in_heap()
    device = pick_device(settings.device)
    clips, features = _features(settings, device)
    torch.manual_seed(settings.seed)
    model = registry.build(settings.model)
    if source := settings.model.get("from_pretrained"):
        print(weights.load_weights(model, source))
    model = place(model, device).train()
    if settings.compile:
        compile_blocks(model)
    losses = [
        flow_loss(model, settings, ratios, one, Batches(encoded, one.batch_size, settings.seed, device))
        for one, encoded in zip(clips.sets, features, strict=True)
    ]

    def loss(step: int, generator: torch.Generator) -> Tensor:
        return losses[clips.pick(step)](step, generator)

    model.config = {**model.config, "trained_sizes": [[one.num_frames, *one.image_size] for one in clips.sets]}
    trainer = Trainer(settings, model, loss, device, clips.period or 1)
    folder = trainer.run()
    if trainer.step < trainer.total_steps:
        return folder
    final = Path(settings.outputs) / "ema"
    config = {"model_type": settings.model["type"], **model.config}
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


def compile_blocks(model: nn.Module) -> None:
    """Compiles each kind of block once, for any size: they take nearly all the time, and the whole takes minutes."""
    for name, blocks in model.named_children():
        if name.endswith("blocks") and isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.compile(dynamic=True)


def flow_loss(
    model: nn.Module, settings: TrainSettings, ratios: MaskRatios | None, clips: ShapeClips, batches: Batches
) -> Loss:
    """The rectified-flow loss of a step's batch of `clips`, which have one size.

    Text is dropped with the model's class_dropout_prob; frames are given as often as `ratios` say.
    """
    scheduler = registry.build(settings.scheduler)
    height, width = clips.image_size
    fps = settings.dataset.get("fps", 24)
    size = {"height": height, "width": width, "num_frames": clips.num_frames}
    told = size_conditioning("STDiT2", 1, clips.image_size, clips.num_frames, fps, device=batches.device)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        batch = batches(step)
        text = batch.text.float()[:, None]  # [B, 1, L, C_text]
        drop = torch.rand(len(text), generator=generator) < model.class_dropout_prob
        text = torch.where(drop.to(text.device)[:, None, None, None], model.null_caption(text), text)
        latents = batch.latents.float()
        given = None
        if ratios is not None:
            given = ratios.draw(len(latents), latents.shape[2], generator).to(latents.device)
            latents = end_in_image(latents, batch.last.float(), given)
        cond = {name: value.expand(len(text)) for name, value in told.items()} | {"y": text, "mask": batch.mask}
        return scheduler.training_loss(model, latents, cond, **size, mask=given, generator=generator).mean()

    return loss


def end_in_image(latents: Tensor, last: Tensor, mask: Tensor) -> Tensor:
    """`latents` [B, C, T, H, W] with `last` [B, C, H, W] at their end where `mask` [B, T] gives that frame alone.

    Whoever asks for a clip that ends in a picture gives a picture: its latents are not those of the end of a video.
    """
    if mask.shape[1] == 1:
        return latents
    alone = ~mask[:, -1] & mask[:, -2]
    end = torch.where(alone[:, None, None, None], last, latents[:, :, -1])
    return torch.cat((latents[:, :, :-1], end[:, :, None]), dim=2)


def _features(settings: TrainSettings, device: torch.device) -> tuple[MixedClips, list[Features]]:
    """The clips of the settings, and the latents and text of each size, encoded by the frozen encoders.

    With several sizes the features of each lie in a folder of their own, named after it.
    """
    dataset = settings.dataset or {}
    clips = shape_clips(dataset, settings.batch_size, dataset.get("seed", 0), "features", "num_clips")
    for name in ("vae", "text_encoder"):
        if getattr(settings, name) is None:
            raise ConfigError(f"training a diffusion model needs a section {name}")
    how = (device, torch.float32, settings.offline)
    vae, vae_summary = components.load(settings.vae, "vae", *how)
    text_encoder, text_summary = components.load(settings.text_encoder, "text_encoder", *how)
    folder = Path(dataset["features"])

    def encode(one: ShapeClips, indices: range) -> dict[str, Tensor]:
        made = [one.clip(index) for index in indices]
        videos = to_model([clip.video for clip in made])
        with torch.no_grad(), training_context(device, settings.dtype):
            parts = [vae.encode(part.to(device), sample=False).cpu() for part in videos.split(ENCODE_BATCH)]
            last = vae.encode(videos[:, :, -1:].to(device), sample=False).cpu()
        text, mask = text_encoder.encode([preprocess(clip.text) for clip in made])
        room = text_encoder.model_max_length - mask.shape[1]
        return {
            "latents": torch.cat(parts).half(),
            "last": last[:, :, 0].half(),
            "text": nn.functional.pad(text[:, 0].half().cpu(), (0, 0, 0, room)),
            "mask": nn.functional.pad(mask.cpu(), (0, room)),
        }

    def features(one: ShapeClips) -> Features:
        identity = {
            "clips": {"frames": one.num_frames, "image_size": one.image_size, "seed": one.seed},
            "vae": vae_summary.sha256,
            "text_encoder": text_summary.sha256,
            "model_max_length": text_encoder.model_max_length,
            "dtype": settings.dtype,
            "tensors": Features._fields,
        }
        where = folder / str(one) if dataset.get("sizes") else folder
        return encode_once(where, dataset["num_clips"], identity, partial(encode, one))

    return clips, [features(one) for one in clips.sets]
