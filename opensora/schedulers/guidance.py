"""Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), and the model interface that it calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

Conditioning = Mapping[str, Any]  # keyword arguments of a model: text, text mask, sizes; tensors have the batch first


class Denoiser(Protocol):
    """A model as a sampler calls it, or any function with this signature.

    x: noisy latents [B, C, T, H, W]
    timestep: [B], or [1] where all samples share it
    conditioning: tensors of B rows, or of one row for all samples
    Returns [B, C or more, T, H, W]; channels beyond C are a learned variance.
    """

    def __call__(self, x: Tensor, timestep: Tensor, **conditioning: Any) -> Tensor: ...


class PreparableDenoiser(Denoiser, Protocol):
    """A model that can compute once what depends on the conditioning alone."""

    def prepare(self, shape: Sequence[int], **conditioning: Any) -> dict[str, Any]:
        """Keyword arguments that replace `conditioning` in calls of the model on latents of this shape."""


def num_branches(scale: float) -> int:
    """Guidance branches of an evaluation: conditional alone at scale 1, otherwise conditional and unconditional."""
    return 1 if scale == 1 else 2


class GuidedDenoiser:
    """A denoiser that predicts uncond + scale * (cond - uncond), in the dtype of x.

    model: predicts [B, C or more, T, H, W], of which the first C channels are used
    cond: the conditioning with the prompt
    null: the entries that replace those of `cond` without the prompt, usually `y` alone; not used at scale 1
    channels: if given, all predicted channels are used; the first `channels` are guided, the rest (learned variance)
        come from the conditional branch
    sequential: evaluate the branches one after the other, which takes less memory. Otherwise they share a batch
        [cond, uncond] if all their tensors agree in shape.
    precompute: let `model.prepare` compute once what does not change from step to step
    Raises ValueError for another scale than 1 without `null`.
    """

    def __init__(
        self, model: Denoiser, cond: Conditioning, null: Conditioning | None, scale: float,
        channels: int | None = None, *, sequential: bool = False, precompute: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.scale, self.channels, self.precompute = model, scale, channels, precompute
        self.batches, self.joined = [cond], False
        self._prepared: list[Conditioning] | None = None
        if num_branches(scale) == 2:
            if null is None:
                raise ValueError(f"guidance scale {scale} needs the unconditional arguments; pass null, or use scale 1")
            uncond = {**cond, **null}
            batch = None if sequential else _join(cond, uncond)
            self.batches = [cond, uncond] if batch is None else [batch]
            self.joined = batch is not None

    def __call__(self, x: Tensor, timestep: Tensor, **masks: Tensor) -> Tensor:
        """The guided prediction [B, C or more, T, H, W]; `masks` are arguments of this step, such as `x_mask`."""
        if num_branches(self.scale) == 1:
            return self._predict(self._arguments(x)[0], x, timestep, masks)
        return self.combine(*self.branches(x, timestep, **masks))

    def branches(self, x: Tensor, timestep: Tensor, **masks: Tensor) -> tuple[Tensor, Tensor]:
        """The predictions of the conditional and the unconditional branch."""
        if not self.joined:
            cond, uncond = (self._predict(arguments, x, timestep, masks) for arguments in self._arguments(x))
            return cond, uncond
        timestep = timestep if len(timestep) == 1 else torch.cat([timestep, timestep])
        doubled = {name: torch.cat([mask, mask]) for name, mask in masks.items()}
        x = torch.cat([x, x])
        cond, uncond = self._predict(self._arguments(x)[0], x, timestep, doubled).chunk(2)
        return cond, uncond

    def combine(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """The guided prediction of the two branches."""
        out = uncond + self.scale * (cond - uncond)
        channels = self.channels
        return out if channels is None else torch.cat([out[:, :channels], cond[:, channels:]], dim=1)

    def _arguments(self, x: Tensor) -> list[Conditioning]:
        """The conditioning of each batch for latents like x, precomputed in the first evaluation with `precompute`."""
        if not self.precompute:
            return self.batches
        if self._prepared is None:
            model = cast(PreparableDenoiser, self.model)
            self._prepared = [model.prepare(x.shape, **batch) for batch in self.batches]
        return self._prepared

    def _predict(self, conditioning: Conditioning, x: Tensor, timestep: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        out = self.model(x, timestep, **conditioning, **masks)
        return (out[:, : x.shape[1]] if self.channels is None else out).to(x.dtype)


def _join(cond: Conditioning, uncond: Conditioning) -> dict[str, Any] | None:
    """The conditioning of the batch [cond, uncond], or None if the two cannot share a batch."""
    joined: dict[str, Any] = {}
    for name, other in uncond.items():
        value = cond.get(name)
        if value is other and not (isinstance(value, Tensor) and value.ndim and len(value) > 1):
            joined[name] = value  # one row is broadcast
        elif isinstance(value, Tensor) and value.ndim and value.shape == getattr(other, "shape", None):
            joined[name] = torch.cat([value, other])
        else:
            return None
    return joined
