"""What the samplers share: types of arguments, checks of settings, shapes, random numbers, progress, masks of frames.

Axes: latents [B, C, T, H, W], frame masks and values [B, T].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from opensora.errors import ConfigError, did_you_mean

Number = float | Tensor | None  # one value, or one per sample [B]; None where no transform asks for it
Progress = bool | Callable[[int, int], None]  # a bar, or what is called with (steps done, steps)
NoiseSource = Sequence[torch.Generator] | Callable[[], Tensor]  # one generator per sample, or what gives the numbers


@dataclass
class Pause:
    """Sampling in two parts: it begins after `done` steps with the `tensors` left then, and stops after `until` steps.

    Where it has stopped, `done` and `tensors` are all that going on takes, but for `source`, which goes on as it is,
    and what `sample` gives are the clean latents that its last step predicts. Without `until` it runs to the end.
    """

    until: int | None = None
    done: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, initial: Tensor) -> Tensor:
        """What was left under a name, or `initial` at the start. Raises ConfigError where nothing was left."""
        if self.done and name not in self.tensors:
            raise ConfigError(f"the draft lacks the sampler's tensor '{name}'; make the draft again")
        return self.tensors[name].to(initial) if self.done else initial

    def leave(self, num_steps: int, x: Tensor, clean: Tensor, **others: Tensor) -> Tensor:
        """`x` after the last of `num_steps`; before it `clean`, with `x` and `others` kept to go on from."""
        if self.done == num_steps:
            return x
        self.tensors = {"x": x, **others}
        return clean


def check(settings: Any, positive: Sequence[str], **choices: Collection[str]) -> None:
    """Raises ConfigError when a `positive` field of `settings` is below 1, or another is none of its `choices`."""
    for name in positive:
        if (value := getattr(settings, name)) is not None and value < 1:
            raise ConfigError(f"scheduler: {name} is {value}; it must be at least 1")
    for name, known in choices.items():
        if (value := getattr(settings, name)) not in known:
            remedy = f"choose {' or '.join(known)}{did_you_mean(value, known)}"
            raise ConfigError(f"scheduler: {name} '{value}' is not known; {remedy}")


def per_sample(value: Tensor) -> Tensor:
    return value[:, None, None, None, None]  # [B] -> [B, 1, 1, 1, 1]


def per_frame(value: Tensor) -> Tensor:
    return value[:, None, :, None, None]  # [B, T] -> [B, 1, T, 1, 1]


def frame_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean [B] of `values` [B, T] over the frames where `mask` [B, T] is True; 0 where no frame is."""
    return values.mean(dim=1) if mask is None else (values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def edited(edit: Tensor | None, x: Tensor) -> Tensor | None:
    """`edit` [B, T] as float on the device of `x`, or None where it generates every frame, which is no edit."""
    return None if edit is None or bool((edit >= 1).all()) else edit.to(x)


def draw(source: NoiseSource, x: Tensor, rows: Tensor | None = None) -> Tensor:
    """Standard-normal numbers of the shape of `x`, drawn where the generators live and moved to `x`.

    Where `rows` [B] is False a sample has no use for them: its generator is left alone, and it gets zeros.
    """
    if callable(source):
        return source().to(x)
    if len(source) != len(x):
        raise ValueError(f"{len(source)} generators for a batch of {len(x)}; pass one per sample")
    noise = torch.zeros_like(x)
    for row, one in enumerate(source):
        if rows is None or rows[row]:
            noise[row] = torch.randn(x.shape[1:], generator=one, device=one.device).to(x)
    return noise


def counted(num_steps: int, progress: Progress, pause: Pause) -> Iterator[int]:
    """0, 1, ... `num_steps` - 1, or the part of `pause`; each is reported to `progress` when it has been worked off."""
    todo = range(pause.done, min(pause.until or num_steps, num_steps))
    bar = {"desc": "sampling", "unit": "step", "total": num_steps, "initial": pause.done}
    for step in tqdm(todo, **bar, disable=progress is not True):
        yield step
        pause.done = step + 1
        if callable(progress):
            progress(step + 1, num_steps)
