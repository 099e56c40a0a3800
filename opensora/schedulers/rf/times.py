"""Times of rectified flow: 1 is noise, 0 is data. Where to step when sampling, what to draw when training."""

from __future__ import annotations

import torch

CHUNK_PIXEL_FRAMES = 17  # one chunk of the video autoencoder: 17 pixel frames
CHUNK_LATENT_FRAMES = 5  # become 5 latent frames

Number = float | torch.Tensor  # one value, or one per sample [B]


def timestep_transform(
    time: torch.Tensor,
    height: Number,
    width: Number,
    num_frames: Number,
    scale: float = 1.0,
    base_resolution: float = 512 * 512,
    base_num_frames: float = 1,
) -> torch.Tensor:
    """`time` (0..1, broadcast against the samples) shifted towards noise for large videos; keeps 0 and 1 in place.

    The shift is r t / (1 + (r - 1) t) with r = scale * sqrt(height * width / base_resolution) * sqrt(latent frames /
    base_num_frames): Esser et al. 2024 (Stable Diffusion 3, arXiv:2403.03206), section 5.3.2, with time added.
    `height` and `width` are pixels, `num_frames` pixel frames. A batch whose first sample is an image is a batch of
    images. Videos shorter than one chunk (2 to 16 frames) count as one chunk; Open-Sora 1.2 counted zero latent frames
    there, which gives r = 0: time 0 everywhere and 0/0 at time 1.
    """
    height, width, num_frames = (
        torch.as_tensor(value, dtype=torch.float32, device=time.device).reshape(-1)
        for value in (height, width, num_frames)
    )
    chunks = (num_frames // CHUNK_PIXEL_FRAMES).clamp(min=1)
    latent_frames = torch.where(num_frames[:1] == 1, 1.0, chunks * CHUNK_LATENT_FRAMES)
    ratio = scale * (height * width / base_resolution).sqrt() * (latent_frames / base_num_frames).sqrt()
    return ratio * time / (1 + (ratio - 1) * time)


def sampling_times(num_steps: int, num_timesteps: int = 1000, discrete: bool = False) -> torch.Tensor:
    """The `num_steps` + 1 times 1, 1 - 1/N, ..., 0 between which Euler's method steps, float32 [N + 1] on the CPU.

    `discrete` rounds them to whole timesteps.
    """
    times = [1 - step / num_steps for step in range(num_steps + 1)]
    if discrete:
        times = [round(time * num_timesteps) / num_timesteps for time in times]
    return torch.tensor(times, dtype=torch.float32)


def uniform_times(draw: torch.Tensor, num_timesteps: int = 1000, discrete: bool = False) -> torch.Tensor:
    """Training times from uniform numbers `draw` in [0, 1); `discrete` takes the whole timestep below."""
    return (draw * num_timesteps).floor() / num_timesteps if discrete else draw


def logit_normal_times(draw: torch.Tensor, loc: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Training times from standard-normal `draw`: sigmoid(loc + scale * draw); Esser et al. 2024, section 3.1."""
    return torch.sigmoid(loc + scale * draw)
