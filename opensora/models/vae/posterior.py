"""The diagonal Gaussian that an autoencoder's encoder describes (Kingma & Welling 2013)."""

from __future__ import annotations

import torch
from torch import Tensor


class DiagonalGaussian:
    """mean and logvar (clamped to [-30, 20]) are the two halves of `moments` [N, 2 C, ...] along axis 1."""

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise; the noise comes from `generator`, or torch's default one."""
        device = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """The most likely value: the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence to the standard normal, summed over all but the batch axis: [N]."""
        terms = self.mean**2 + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(dim=1)
