"""From gradients to weights: gradient scaling, clipping, bad-step guard, AdamW and EMA."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora.acceleration.device import fastest_adamw
from opensora.acceleration.streams import is_asynchronous
from opensora.config.settings import TrainSettings
from opensora.distributed.fsdp import clip_grad_norm
from opensora.distributed.process_group import RankLayout
from opensora.training.bad_step_guard import GO, BadStepGuard, FiniteCheck, Verdict
from opensora.training.ema import EMA


class Update(NamedTuple):
    """An optimizer step: the gradient norm before clipping (scalar), and the check whether the step is good."""

    grad_norm: Tensor
    check: FiniteCheck


class Optimization:
    """AdamW, gradient scaler, clipping, bad-step guard and EMA of one model. `step`, then `finish`, for each step.

    With `deferred_check` (default: where the device supports it) the optimizer kernel itself skips a bad step, and
    `finish` may be called after the next backward pass has been launched, so the host never waits within a step.
    Without it, `finish` waits for the check and then updates the weights. Both give the same weights.
    `report` receives one log line for each bad step.
    """

    def __init__(
        self, model: nn.Module, settings: TrainSettings, device: torch.device, layout: RankLayout | None = None,
        report: Callable[[dict[str, Any]], None] | None = None, deferred_check: bool | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.device = settings, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        kernels = fastest_adamw(device)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, betas=settings.adam_betas, eps=settings.adam_eps,
            weight_decay=settings.weight_decay, **kernels,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "fp16")
        self.ema = EMA(model, settings.ema_decay)
        self.guard = BadStepGuard(model, settings, layout, report)
        if deferred_check is None:
            deferred_check = settings.dtype != "fp16" and kernels["fused"] and is_asynchronous(device)
        self.deferred_check = deferred_check

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one of the step's `accumulation_steps` batches."""
        self.scaler.scale(loss / self.settings.accumulation_steps).backward()

    def step(self, loss: Tensor, learning_rate: float) -> Update:
        """Clips the gradients and checks the step; with `deferred_check`, also updates the weights unless it is bad.

        `loss` is the mean loss of the step's batches. Does not wait for the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_grad_norm(self.parameters, self.settings.grad_clip or math.inf)
        check = self.guard.launch(loss, grad_norm)
        if self.deferred_check:
            # As GradScaler does: the fused kernel changes nothing where it is 1.
            self.optimizer.found_inf = check.bad  # type: ignore[attr-defined]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return Update(grad_norm, check)

    def finish(self, update: Update, sample_ids: Sequence[str], step: int, recompute: Callable[[], Tensor]) -> Verdict:
        """Waits for the check of an update and completes the step: weights (unless updated by `step`), scaler, EMA.

        Unless the verdict is "go", all gradients are dropped, those of a next step included. `recompute` repeats the
        forward pass to find the cause of a bad step; see `BadStepGuard.resolve`.
        """
        verdict = self.guard.resolve(update.check, sample_ids, step, recompute)
        if not self.deferred_check:
            if verdict == GO:
                self.scaler.step(self.optimizer)
            self.scaler.update()
        if verdict != GO or not self.deferred_check:
            self.optimizer.zero_grad(set_to_none=True)
        if verdict == GO:
            self.ema.update()
        return verdict
