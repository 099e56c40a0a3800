"""The frame masks of training, `mask_ratios`: which latent frames of a clip the model is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from opensora.errors import ConfigError, did_you_mean

TOLERANCE = 1e-6  # of the sum of ratios


def _uniform(low: int, high: int, generator: torch.Generator) -> int:
    """A random integer from `low` to `high`, inclusive."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _quarter(frames: int, generator: torch.Generator) -> int:
    """How many frames a quarter_* type gives: at least one, at most a quarter of them."""
    return _uniform(1, max(frames // 4, 1), generator)


def _one(_: int, __: torch.Generator) -> int:
    return 1


def _half(frames: int, _: torch.Generator) -> int:
    return frames // 2


Length = Callable[[int, torch.Generator], int]
LENGTHS: dict[str, Length] = {"quarter": _quarter, "image": _one, "half": _half}
POSITIONS = ("random", "head", "tail", "head_tail")
TYPES = (
    "identity", "random", "intepolate", "interpolate", "half_head",
    *(f"{length}_{place}" for length in ("quarter", "image") for place in POSITIONS),
)  # fmt: skip


def draw_mask(kind: str, frames: int, generator: torch.Generator) -> Tensor:
    """A mask bool [frames] of latent frames: True is generated, False is given. At least one frame is generated.

    `identity` gives nothing; `image_*`, `quarter_*` and `half_*` one frame, up to a quarter and half of the frames at
    the start (head), end (tail), both or somewhere; `interpolate` every second frame; `random` a share of 0.1 to 0.9.
    A single frame is always generated.
    """
    mask = torch.ones(frames, dtype=torch.bool)
    if kind == "identity" or frames == 1:
        return mask
    if kind == "random":
        mask = torch.rand(frames, generator=generator) > 0.1 + 0.8 * torch.rand((), generator=generator)
        mask[-1] |= not mask.any()
        return mask
    if kind in ("intepolate", "interpolate"):
        mask[_uniform(0, 1, generator) :: 2] = False
        return mask
    length, place = kind.split("_", 1)
    given = LENGTHS[length](frames, generator)
    if place == "random":
        start = _uniform(0, frames - given, generator)
        mask[start : start + given] = False
        return mask
    if "head" in place:
        mask[:given] = False
    if place == "tail" or ("tail" in place and 2 * given < frames):
        mask[-given:] = False
    return mask


class MaskRatios:
    """The probability of each mask type; `identity` takes the rest.

    Raises ConfigError for a type that does not exist and for ratios that are negative or do not add up to 1.
    """

    def __init__(self, ratios: Mapping[str, float]) -> None:
        for kind, ratio in ratios.items():
            if kind not in TYPES:
                raise ConfigError(f"mask_ratios: unknown type '{kind}'{did_you_mean(kind, TYPES)}")
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
                raise ConfigError(f"mask_ratios: {kind} must be a number from 0 to 1; it is {ratio!r}")
        total = math.fsum(ratios.values())
        if total > 1 + TOLERANCE or ("identity" in ratios and total < 1 - TOLERANCE):
            raise ConfigError(f"mask_ratios add up to {total:g}; they must add up to 1 (or less without identity)")
        self.ratios = dict(ratios)
        self.ratios.setdefault("identity", max(1 - total, 0.0))

    def draw(self, batch_size: int, frames: int, generator: torch.Generator) -> Tensor:
        """Masks bool [batch_size, frames] as `draw_mask` gives them, a type for each sample."""
        weights = torch.tensor(list(self.ratios.values()), dtype=torch.float64)
        kinds = torch.multinomial(weights, batch_size, replacement=True, generator=generator)
        names = list(self.ratios)
        return torch.stack([draw_mask(names[kind], frames, generator) for kind in kinds.tolist()])
