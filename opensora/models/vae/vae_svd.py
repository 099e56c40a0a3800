"""The autoencoder of Stable Video Diffusion (Blattmann et al. 2023): a per-frame encoder, a decoder that sees time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opensora.models.layers.arguments import arguments_of
from opensora.models.layers.pieces import concatenated
from opensora.models.vae.temporal_decoder import AutoencoderKLTemporalDecoder
from opensora.models.vae.vae import FrameAutoencoder


class VideoAutoencoderKLTemporalDecoder(FrameAutoencoder):
    """AutoencoderKLTemporalDecoder: one latent frame for each frame; those decoded together smooth one another."""

    network = AutoencoderKLTemporalDecoder

    def __init__(
        self, micro_batch_size: int | None = None, in_channels: int = 3, out_channels: int = 3,
        latent_channels: int = 4, layers_per_block: int = 2,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",) * 4,
    ) -> None:  # fmt: skip
        super().__init__(arguments_of(locals()))

    def decode(self, z: Tensor, **_: Any) -> Tensor:
        """Video [B, 3, T, H * 8, W * 8], about in [-1, 1], of scaled latents z [B, C, T, H, W].

        Each video is decoded by itself, `micro_batch_size` consecutive frames at a time (None: all).
        """
        size = self.micro_batch_size or z.shape[2]
        videos = [concatenated(self.decode_frames, video.split(size)) for video in z.transpose(1, 2)]
        return torch.stack(videos).transpose(1, 2)
