"""Decides what becomes of each training step: a loss or gradients that are not finite, or a jump of the gradient norm,
never reach the weights."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from opensora.acceleration.streams import read_async
from opensora.config.settings import TrainSettings
from opensora.distributed.collectives import all_reduce_mean
from opensora.distributed.process_group import RankLayout
from opensora.errors import OpenSoraError
from opensora.training.bad_step_diagnosis import GRADIENTS, LOSS, SPIKE, BadStep, Diagnosis, Recompute, RecomputeSample

logger = logging.getLogger("opensora")
Verdict = Literal["go", "skip", "roll back"]
GO: Verdict = "go"
ROLL_BACK: Verdict = "roll back"

WINDOW, MIN_NORMS = 200, 50  # gradient norms whose median is the usual one, and how many it takes
MAX_OVERFLOWS = 24  # in a row, in fp16: enough to bring the scale of the loss from 2**16 below 1


class FiniteCheck(NamedTuple):
    """A check that runs on the device.

    bad: 1 where the optimizer must skip the step, else 0 (float scalar on the device)
    read: waits for the loss, the gradient norm and `bad`
    """

    bad: Tensor
    read: Callable[[], list[float]]


class BadStepGuard:
    """Judges the steps of a run by `on_bad_step`, `max_bad_steps` and `spike_factor`.

    `report` receives one log line for each bad step. All ranks call `launch` and `resolve`, or `check`, together and
    get the same verdict. A step is resolved before the next one is launched.
    """

    def __init__(
        self, model: nn.Module, settings: TrainSettings, layout: RankLayout | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.layout, self.report = settings, layout or RankLayout(), report
        self.diagnosis = Diagnosis(model, self.layout)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = self.overflows = 0

    def state_dict(self) -> dict[str, Any]:
        """The guard's memory, as JSON types."""
        return {"norms": list(self.norms), "in_a_row": self.in_a_row, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`."""
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.in_a_row, self.overflows = state["in_a_row"], state["overflows"]

    def launch(self, loss: Tensor, grad_norm: Tensor) -> FiniteCheck:
        """Starts the check of a step on the device. Both arguments are scalars; the norm is that before clipping."""
        values = all_reduce_mean(torch.stack([value.detach().float() for value in (loss, grad_norm)]), self.layout)
        bad = 1 - (values.isfinite().all() & (values[1] <= self._limit())).float()
        return FiniteCheck(bad, read_async(torch.cat([values, bad[None]])))

    def check(
        self, loss: Tensor, grad_norm: Tensor, sample_ids: Sequence[str] = (), step: int = 0,
        recompute: Recompute | None = None, recompute_sample: RecomputeSample | None = None,
    ) -> Verdict:  # fmt: skip
        """`launch` and `resolve` at once; waits for the device."""
        return self.resolve(self.launch(loss, grad_norm), sample_ids, step, recompute, recompute_sample)

    def resolve(
        self, check: FiniteCheck, sample_ids: Sequence[str] = (), step: int = 0,
        recompute: Recompute | None = None, recompute_sample: RecomputeSample | None = None,
    ) -> Verdict:  # fmt: skip
        """Waits for a check and returns the verdict: before the optimizer step, or after one that skips where `bad`.

        "skip": the gradients are dropped, and nothing changes but the fp16 loss scale. "roll back": in addition the run
        reloads its last checkpoint, while the data goes on after this batch (PaLM, Chowdhery et al. 2022,
        arXiv:2204.02311, section 5.1); without a checkpoint it means "skip". In fp16, overflowing gradients are left to
        the scaler as long as a smaller scale may help: "go", although `bad` is 1.

        `recompute()` repeats the forward pass of this rank's part of the step with the same noise and gives the loss of
        each sample [B], in the order of `sample_ids`, or their mean; `recompute_sample(i)` does so for one sample
        alone. They find the cause of a bad step; gradients are lost then. Raises OpenSoraError when the run must stop.
        """
        loss, grad_norm, bad = check.read()
        problem = self._judge(loss, grad_norm, bool(bad))
        if math.isfinite(grad_norm):
            self.norms.append(grad_norm)
        if problem is None:
            self.in_a_row = 0
            return GO
        self.in_a_row += 1
        stops = self.settings.on_bad_step == "stop" or self.in_a_row >= self.settings.max_bad_steps
        verdict: Verdict = ROLL_BACK if self.settings.on_bad_step == "rollback" else "skip"
        event = BadStep(step, problem, f"{loss:.4g}", f"{grad_norm:.4g}", "stop" if stops else verdict)
        with torch.compiler.set_stance("force_eager"):
            self.diagnosis.run(event, grad_norm, [str(one) for one in sample_ids], recompute, recompute_sample)
        if self.report is not None and self.layout.is_main:
            known = {name: value for name, value in asdict(event).items() if value not in (None, "", [])}
            self.report({"step": known.pop("step"), "bad_step": known})
        if stops:
            raise OpenSoraError(f"{event}; {self._remedy(event)}")
        logger.warning("%s: %s", event, verdict)
        return verdict

    def _limit(self) -> float:
        """The largest gradient norm that is not a spike."""
        factor = self.settings.spike_factor
        return factor * statistics.median(self.norms) if factor and len(self.norms) >= MIN_NORMS else math.inf

    def _judge(self, loss: float, grad_norm: float, bad: bool) -> str | None:
        """What is wrong with a step, or None."""
        if not math.isfinite(loss):
            return LOSS
        if not math.isfinite(grad_norm):
            self.overflows += 1
            return None if self.settings.dtype == "fp16" and self.overflows <= MAX_OVERFLOWS else GRADIENTS
        self.overflows = 0
        return SPIKE if bad else None

    def _remedy(self, event: BadStep) -> str:
        rows = f"{self.in_a_row} bad steps in a row" if self.in_a_row > 1 else "the run stops here"
        resume = "resume from the last checkpoint with --load"
        if event.poisoned:
            return f"{rows}; remove that sample and {resume}"
        if event.what == SPIKE:
            return f"{rows}; {resume} and a lower lr, or with a larger spike_factor if such gradients are usual"
        return f"{rows}; {resume} and a lower lr, grad_clip or dtype fp32"
