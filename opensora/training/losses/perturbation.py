"""Input perturbation: the model learns to correct noised latents whose color or shape their caption denies.

A sampler's own errors feed its next steps, while training shows only right latents: exposure bias. Ning et al. 2023
(arXiv:2301.11706) add noise to the inputs of training; here they lean towards other scenes, as they do in sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opensora.schedulers.common import per_sample, upload

LEAN = (-0.7, 1.0)  # range of the lean: 1 is the altered scene, negative values overshoot away from it
SLOPE = 0.6  # deviation of the change of the lean across the frame
MOST = 2.0  # largest factor of the lean, where the difference is small
STRONG = 0.1  # of the largest squared difference of a clip: where it is less does not count in its size


class InputPerturbation:
    """Errors of latents [B, C, T, H, W]: a part of the samples, `probability`, leans towards the latents `altered`.

    The lean changes linearly over time and across the frame, from values drawn for each sample.
    """

    def __init__(self, latents: Tensor, altered: Tensor, probability: float, generator: torch.Generator) -> None:
        chosen = torch.rand(len(latents), generator=generator) < probability
        lean = draw_lean(latents.shape, generator) * per_sample(chosen)
        self.difference, self.lean = altered - latents, upload(lean, latents)
        self.size = typical_size(self.difference)

    def __call__(self, time: Tensor) -> Tensor:
        """The errors at times [B] below 1, where they are strong about as large as the noise beside the data."""
        noise = time / (1 - time).clamp(min=1e-3)
        return per_sample((noise / self.size).clamp(max=MOST)) * self.lean * self.difference


def draw_lean(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random leans [B, 1, T, H, W] within LEAN for latents of a shape [B, C, T, H, W]."""
    batch, _, frames, height, width = shape
    low, high = LEAN
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
