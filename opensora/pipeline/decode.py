"""Runs the autoencoder: latents to frames, and frames to latents."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from opensora.datasets.video import to_uint8
from opensora.pipeline.job import Job
from opensora.pipeline.loaded_models import LoadedModels


class DecodedClip(NamedTuple):
    """A clip as uint8 [T, H, W, 3], and as video [3, T, H, W] in [-1, 1] if the next clip continues from it."""

    frames: np.ndarray
    video: Tensor | None


def decode(models: LoadedModels, job: Job, latents: Tensor, keep_video: bool = False) -> DecodedClip:
    """Decodes latents [1, C, T', H, W] piece by piece; the device holds one piece at a time."""
    frames, kept, begin = np.empty((job.size.num_frames, *job.frame_size, 3), np.uint8), [], 0
    with models.on_device("vae"):
        for piece in models.vae.decoded(latents.to(models.dtype), num_frames=job.size.num_frames):
            end = begin + piece.shape[2]
            frames[begin:end], begin = to_uint8(piece[0]), end
            if keep_video:
                kept.append(piece[0].cpu())
    return DecodedClip(frames, torch.cat(kept, dim=1) if keep_video else None)


def encode(models: LoadedModels, frames: Tensor) -> Tensor:
    """The latents [C, T', H, W] of frames [3, T, H, W] in [-1, 1], on the CPU."""
    pieces = (piece.to(models.device, models.dtype) for piece in models.plan.split_video(frames[None]))
    with models.on_device("vae"):
        return models.vae.encoded(pieces)[0].float().cpu()
