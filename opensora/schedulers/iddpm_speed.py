"""SpeeD: IDDPM trained more often on the most useful steps (Wang et al. 2024, arXiv:2405.17403)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from opensora.schedulers.iddpm import IDDPM

PREFERENCE = 5  # how many times likelier a step is where the noise level still rises
RISE, STEEPNESS = 1e-4, 2e6  # center (noise level per step) and slope of the sigmoid between the two
LEAST_RISE = 5e-5  # the meaningful steps end when the noise level rises by less


@dataclass(frozen=True)
class IDDPM_SPEED(IDDPM):
    """IDDPM with other training: steps are drawn non-uniformly, in pairs, and their squared errors are weighted.

    Steps where sqrt(1 - alpha-bar), the noise level, has all but stopped rising are five times rarer. Each drawn step
    t is paired with |meaningful_steps - t|, so that every batch holds early and late ones.
    """

    @cached_property
    def probabilities(self) -> Tensor:
        """The probability of drawing each step, [N]."""
        weights = 1 + (PREFERENCE - 1) * torch.sigmoid(STEEPNESS * (self._rise - RISE))
        return weights / weights.sum()

    @cached_property
    def loss_weights(self) -> Tensor:
        """The loss weight of each step: 1 / (1 + signal-to-noise ratio) = 1 - alpha-bar, [N]."""
        return 1 - self.process.alphas_cumprod

    @cached_property
    def meaningful_steps(self) -> int:
        """The number of steps until the noise level hardly rises, 700 of 1000; step 0 is paired with it."""
        return min(int((self._rise >= LEAST_RISE).sum()) + 1, len(self.process) - 1)

    def draw_steps(self, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        probabilities = self.probabilities.float().to(device)
        drawn = torch.multinomial(probabilities, count // 2 + 1, replacement=True, generator=generator)
        return self.paired(drawn, count)

    def paired(self, drawn: Tensor, count: int) -> Tensor:
        """`drawn` and the steps paired with them, cut to `count`."""
        return torch.cat([drawn, (self.meaningful_steps - drawn).abs()])[:count]

    def training_terms(self, *args: Any, weights: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """As in IDDPM, with each step weighted by `loss_weights` and by `weights` [N]."""
        product = self.loss_weights.float()
        if weights is not None:
            product = product.to(weights) * weights
        return super().training_terms(*args, weights=product, **kwargs)

    @property
    def _rise(self) -> Tensor:
        return torch.gradient(self.process.sqrt_one_minus_alphas_cumprod)[0]
