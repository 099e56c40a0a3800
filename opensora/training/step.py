"""One training step: encode, loss, backward pass, optimizer step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opensora.acceleration.precision import training_context
from opensora.config.settings import TrainSettings
from opensora.distributed.process_group import RankLayout
from opensora.training.bad_step_guard import GO, ROLL_BACK
from opensora.training.data.batch import sample_names
from opensora.training.optimization import Optimization, Update

Loss = Callable[[Any, torch.Generator], Tensor]  # encoded batch -> loss of each sample [B], or their mean
Encode = Callable[[Any], Any]  # batch of the loader -> what the loss takes, on the device


def step_generator(seed: int, step: int, batch: int = 0) -> torch.Generator:
    """The CPU generator for everything random in one batch of a training step."""
    key = f"train/{seed}/{step}" + (f"/{batch}" if batch else "")
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class PendingStep(NamedTuple):
    """A launched step whose finite check the host has not read yet. `samples` counts those of all ranks."""

    step: int
    batches: Sequence[Any]
    samples: int
    loss: Tensor
    update: Update


class TrainStep:
    """Calls of this object train the model of `loss`. Random numbers depend only on (seed, step, batch of the step).

    With deferred checks a step finishes after the backward pass of the next one is launched. If it was bad, that
    backward pass is repeated, so the weights are those of a trainer that waits after every step.

    samples: trained on so far, by all ranks, without those of bad steps
    losses: of the good steps since the list was last emptied
    on_batch: called with each encoded batch after its backward pass
    roll_back: reloads the last checkpoint
    """

    def __init__(
        self, settings: TrainSettings, loss: Loss, optimization: Optimization, layout: RankLayout | None = None,
        encode: Encode = lambda batch: batch, on_batch: Callable[[Any], None] = lambda batch: None,
        roll_back: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.settings, self.loss, self.optimization = settings, loss, optimization
        self.layout, self.encode, self.on_batch, self.roll_back = layout or RankLayout(), encode, on_batch, roll_back
        self.pending: PendingStep | None = None
        self.samples = 0
        self.losses: list[Tensor] = []

    def __call__(self, step: int, batches: Sequence[Any], samples: int, learning_rate: float) -> Tensor:
        """Trains on this rank's `batches` of step number `step`; returns the gradient norm before clipping (scalar).

        `samples` is how many samples the batches of all ranks have.
        """
        loss = self._forward_backward(step, batches)
        if not self.finish_pending():
            loss = self._forward_backward(step, batches)
        update = self.optimization.step(loss, learning_rate)
        self.pending = PendingStep(step, batches, samples, loss, update)
        if not self.optimization.deferred_check:
            self.finish_pending()
        return update.grad_norm

    def finish_pending(self) -> bool:
        """Finishes the last step, if it is pending. False if it was bad: all gradients are dropped then."""
        pending, self.pending = self.pending, None
        if pending is None:
            return True
        verdict = self.optimization.finish(
            pending.update, sample_names(pending.batches), pending.step, lambda: self._recompute(pending)
        )
        if verdict == GO:
            self.samples += pending.samples
            self.losses.append(pending.loss)
        elif verdict == ROLL_BACK:
            self.roll_back()
        return verdict == GO

    def reset(self) -> None:
        """Drops the pending step and all gradients, after an exception within a step."""
        self.pending = None
        self.optimization.optimizer.zero_grad(set_to_none=True)

    def _forward_backward(self, step: int, batches: Sequence[Any]) -> Tensor:
        """Accumulates the gradients of the step's batches; returns their mean loss."""
        return torch.stack([self._accumulate(step, part, batch) for part, batch in enumerate(batches)]).mean()

    def _accumulate(self, step: int, part: int, batch: Any) -> Tensor:
        """Adds the gradients of batch number `part` of the step; returns its mean loss."""
        encoded = self.encode(batch)
        loss = self._forward(step, part, encoded).mean()
        self.optimization.backward(loss)
        self.on_batch(encoded)
        return loss.detach()

    def _forward(self, step: int, part: int, encoded: Any) -> Tensor:
        number = part * self.layout.data_size + self.layout.data_rank
        with training_context(self.optimization.device, self.settings.dtype):
            return self.loss(encoded, step_generator(self.settings.seed, step, number))

    def _recompute(self, pending: PendingStep) -> Tensor:
        """The losses of a pending step, computed again: of each sample [B], where the loss has them, or their mean."""
        losses = [self._forward(pending.step, part, self.encode(batch)) for part, batch in enumerate(pending.batches)]
        return torch.cat(losses) if losses[0].ndim else torch.stack(losses).mean()
