"""Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) as a closure over the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

Denoiser = Callable[..., Tensor]


def guided(
    model: Denoiser, cond: Mapping[str, Any], null: Mapping[str, Any] | None, scale: float, channels: int | None = None
) -> Denoiser:
    """`velocity(x, timestep, **frames) -> [B, C, T, H, W]` = uncond + scale * (cond - uncond), in the dtype of x.

    `model(x, timestep, **arguments)` returns [B, C or more, T, H, W]; only its first C channels are used. With
    `channels` all are: that many are guided, the others, such as a variance, are those with the prompt. `cond` holds
    its arguments, tensors with the batch first; `null` holds those that differ without the prompt, usually just `y`, so
    the text mask in `cond` serves both halves. Both run as one batch [cond, uncond] where every pair of tensors has one
    shape, else as two. At scale exactly 1 only the conditional branch runs and `null` may be None. `frames` are
    per-step arguments such as `x_mask`. What does not change from step to step, a model may compute once: its
    `prepare(**arguments)`, if it has one, gives the arguments that it is called with. A model whose `halves_apart` is
    True gets the halves one after the other, which takes less memory; one whose `shares_time` is True, timestep [1]
    where all samples have the same. Raises ValueError when guidance is asked for without `null`.
    """

    def predict(arguments: Mapping[str, Any], x: Tensor, timestep: Tensor, **frames: Tensor) -> Tensor:
        out = model(x, timestep if shares else timestep.expand(len(x)), **arguments, **frames)
        return (out[:, : x.shape[1]] if channels is None else out).to(x.dtype)

    shares = getattr(model, "shares_time", False)
    prepare = cache(lambda: [getattr(model, "prepare", dict)(**one) for one in told])
    told = [cond]
    if scale == 1:
        return lambda x, timestep, **frames: predict(*prepare(), x, timestep, **frames)
    if null is None:
        raise ValueError(f"guidance scale {scale} needs the unconditional arguments; pass null, or use scale 1")
    uncond = {**cond, **null}
    both = None if getattr(model, "halves_apart", False) else _joined(cond, uncond)
    told = [cond, uncond] if both is None else [both]

    def velocity(x: Tensor, timestep: Tensor, **frames: Tensor) -> Tensor:
        if both is None:
            with_text, without = (predict(one, x, timestep, **frames) for one in prepare())
        else:
            times = timestep if len(timestep) == 1 else torch.cat([timestep, timestep])
            twice = {name: torch.cat([value, value]) for name, value in frames.items()}
            with_text, without = predict(*prepare(), torch.cat([x, x]), times, **twice).chunk(2)
        out = without + scale * (with_text - without)
        return out if channels is None else torch.cat([out[:, :channels], with_text[:, channels:]], dim=1)

    return velocity


def _joined(cond: Mapping[str, Any], uncond: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of the batch [cond, uncond], or None where the two cannot share a batch."""
    joined: dict[str, Any] = {}
    for name, without in uncond.items():
        value = cond.get(name)
        if value is without and not (isinstance(value, Tensor) and value.ndim and len(value) > 1):
            joined[name] = value  # one row serves any batch
        elif isinstance(value, Tensor) and value.ndim and value.shape == getattr(without, "shape", None):
            joined[name] = torch.cat([value, without])
        else:
            return None
    return joined
