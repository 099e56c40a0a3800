"""Input perturbation: the model learns to correct noised latents whose color or shape contradict their caption.

A sampler's own errors feed its next steps, while training shows only right latents: exposure bias. Ning et al. 2023
(arXiv:2301.11706) add noise to the inputs of training; here they move towards other scenes, as in sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opensora.schedulers.common import per_sample, upload

WEIGHTS = (-0.7, 1.0)  # range of the interpolation weights: 0 is the right scene, 1 the altered one
SLOPE = 0.6  # standard deviation of the change of a weight across the frame
MAX_SCALE = 2.0  # of the weights, where the difference is small
STRONG = 0.1  # of the largest squared difference of a clip: where it is less does not count in its size


class InputPerturbation:
    """Errors of latents [B, C, T, H, W]: some samples, chosen with `probability`, move towards the latents `altered`.

    The interpolation weights change linearly over time and across the frame, and are drawn for each sample.
    """

    def __init__(self, latents: Tensor, altered: Tensor, probability: float, generator: torch.Generator) -> None:
        chosen = torch.rand(len(latents), generator=generator) < probability
        weights = draw_weights(latents.shape, generator) * per_sample(chosen)
        self.difference, self.weights = altered - latents, upload(weights, latents)
        self.size = typical_size(self.difference)

    def __call__(self, time: Tensor) -> Tensor:
        """The errors at times [B] below 1, where they are strong about as large as the noise beside the data."""
        noise = time / (1 - time).clamp(min=1e-3)
        return per_sample((noise / self.size).clamp(max=MAX_SCALE)) * self.weights * self.difference


def draw_weights(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random interpolation weights [B, 1, T, H, W] within WEIGHTS for latents of a shape [B, C, T, H, W]."""
    batch, _, frames, height, width = shape
    low, high = WEIGHTS
    first, last = (low + (high - low) * torch.rand(batch, 1, 1, 1, 1, generator=generator) for _ in range(2))
    down, right = (SLOPE * torch.randn(batch, 1, 1, 1, 1, generator=generator) for _ in range(2))
    t = torch.linspace(0, 1, frames).view(-1, 1, 1)
    y, x = torch.linspace(-0.5, 0.5, height).view(-1, 1), torch.linspace(-0.5, 0.5, width)
    return (first + (last - first) * t + down * y + right * x).clamp(low, high)


def typical_size(difference: Tensor) -> Tensor:
    """The root mean square [B] of differences [B, C, T, H, W] over the places where they are strong."""
    squared = difference.float().square().mean(dim=1)  # [B, T, H, W]
    strong = squared > STRONG * squared.amax(dim=(1, 2, 3), keepdim=True)
    mean = (squared * strong).sum(dim=(1, 2, 3)) / strong.sum(dim=(1, 2, 3)).clamp(min=1)
    return mean.sqrt().clamp(min=1e-3)
