"""IDDPM trained on the steps that teach most: SpeeD (Wang et al. 2024, arXiv:2405.17403)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from opensora.schedulers.iddpm import IDDPM

FAVOUR = 5  # odds of a step at which the noise level still rises
RISE, STEEPNESS = 1e-4, 2e6  # the rise of the noise level per step that divides the two, and how sharply
LEAST_RISE = 5e-5  # the meaningful steps end when the noise level rises by less


@dataclass(frozen=True)
class IDDPM_SPEED(IDDPM):
    """IDDPM with other training: steps are drawn unevenly, in pairs, and their squared errors are weighted.

    Steps where sqrt(1 - alpha-bar), the noise level, has all but stopped rising are five times rarer. A drawn step
    brings its mirror image in the meaningful steps, so that every batch holds early and late ones.
    """

    @cached_property
    def probabilities(self) -> Tensor:
        """How likely each step is drawn, [N]."""
        weights = 1 + (FAVOUR - 1) * torch.sigmoid(STEEPNESS * (self._rise - RISE))
        return weights / weights.sum()

    @cached_property
    def loss_weights(self) -> Tensor:
        """What multiplies the squared error of each step: 1 / (1 + signal-to-noise ratio) = 1 - alpha-bar, [N]."""
        return 1 - self.process.alphas_cumprod

    @cached_property
    def meaningful_steps(self) -> int:
        """The number of steps before the noise level hardly rises, 700 of 1000; the mirror image of step 0."""
        return min(int((self._rise >= LEAST_RISE).sum()) + 1, len(self.process) - 1)

    def draw_steps(self, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        odds = self.probabilities.float().to(device)
        return self.paired(torch.multinomial(odds, count // 2 + 1, replacement=True, generator=generator), count)

    def paired(self, drawn: Tensor, count: int) -> Tensor:
        """The first `count` of the steps `drawn` followed by their mirror images."""
        return torch.cat([drawn, (self.meaningful_steps - drawn).abs()])[:count]

    def training_terms(self, *args: Any, weights: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """The terms of IDDPM, weighted by `loss_weights` and by `weights` [N]."""
        own = self.loss_weights.float()
        return super().training_terms(*args, weights=own if weights is None else own.to(weights) * weights, **kwargs)

    @property
    def _rise(self) -> Tensor:
        return torch.gradient(self.process.sqrt_one_minus_alphas_cumprod)[0]
