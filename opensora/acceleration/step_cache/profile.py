"""The profile of a model and sampler: what recorded runs say about the error of skipping evaluations."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from opensora.acceleration.step_cache.table import CacheTable

RISK = 3.0  # power of the gains: in logarithms they differ among prompts in proportion to themselves


class Profile(NamedTuple):
    """The predictions of N evaluations, relative to the magnitude of the sample.

    gram: [2 N, 2 N], mean products of the conditional predictions, then of the contributions of guidance
    effects: [N], the weight of an evaluation in the sample
    guided: [N], whether guidance is on there
    gains: [N], the factor by which an error made there grows until the end, because later predictions respond to it; 1
        if unknown
    """

    gram: np.ndarray
    effects: np.ndarray
    guided: np.ndarray
    gains: np.ndarray | float = 1.0

    @property
    def ratios(self) -> list[float]:
        """The ratio of the prediction's magnitude from each evaluation to the next."""
        size = np.sqrt(np.diag(self.gram)[: len(self.effects)])
        return (size[1:] / size[:-1]).tolist()

    @property
    def risks(self) -> np.ndarray:
        """The effects [N] on an unlucky prompt: the larger the gain, the more it differs among prompts."""
        return self.effects * np.asarray(self.gains) ** RISK


def predicted_error(profile: Profile, table: CacheTable) -> float:
    """The relative error of a table if the model's predictions do not depend on its earlier errors.

    With gains it is a measure of risk, to compare tables by.
    """
    count = len(profile.effects)
    left, effects = np.zeros(2 * count), profile.risks
    for offset, least, weights in ((0, 1, table.text), (count, 2, table.guidance)):
        for k in range(count):
            if int(table.branches[k]) >= least or (offset and not profile.guided[k]):
                continue
            left[offset + k] -= effects[k]
            for weight, position in zip(weights[k], table.computed(least, k)[:2], strict=False):
                left[offset + position] += effects[k] * weight
    return math.sqrt(max(left @ profile.gram @ left, 0.0))
