"""The training loop of autoencoders and diffusion models, on one rank or many.

Each step: data -> TrainStep (encode, loss, backward pass, optimizer step) -> log -> callbacks -> checkpoint. All
randomness of a step comes from generators seeded by (seed, step, batch of the step), and its data depends only on the
position. So a run can resume at any step and matches the uninterrupted run bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from opensora.config.settings import TrainSettings
from opensora.distributed.collectives import all_gather_objects, all_reduce_mean, barrier, broadcast_object, run_on_main
from opensora.distributed.process_group import RankLayout
from opensora.errors import OpenSoraError
from opensora.training.checkpoint.fingerprint import differences
from opensora.training.checkpoint.folders import checkpoints
from opensora.training.checkpoint.manager import CheckpointManager
from opensora.training.checkpoint.running_states import RunningStates, read_running_states
from opensora.training.data.history import DataHistory
from opensora.training.data.loader import DataPosition, PrefetchLoader, StepIndices
from opensora.training.data.synchronize import StepBatches, StepSynchronizer
from opensora.training.ema import EMA
from opensora.training.optimization import Optimization
from opensora.training.run_folder import OpenedRun, copy_history, open_run
from opensora.training.schedule import Schedule
from opensora.training.step import Encode, Loss, TrainStep
from opensora.training.stop_signals import StopSignals, signal_name
from opensora.training.throughput import Throughput
from opensora.training.tracking import Tracker

logger = logging.getLogger("opensora")
Callback = Callable[["Trainer"], None]


class Trainer:
    """Trains `model`, already parallelized, on `loss(batch, generator)`, as the settings say.

    loader: batches of this rank; a number instead gives that many batches an epoch, each just its index. Batches with
        `names` and a `weight` may lack samples; a step needs at least one sample on some rank.
    config: config.json of the checkpoints; that of the model by default
    fingerprint: name -> value of all that affects the results of the run; a resumed run must have the same
    encode: turns a batch of the loader into what `loss` takes, on the device
    cost: (clips, tokens, FLOPs) of an encoded batch, for the log
    history: records the data that the run has used, in its folder
    callbacks: called after every step; those that read weights call `finish_pending` first
    deferred_check: see `Optimization`
    base: SHA-256 of the weights that the trained adapter belongs to
    """

    def __init__(
        self, settings: TrainSettings, model: nn.Module, loss: Loss, device: torch.device,
        loader: PrefetchLoader | int, layout: RankLayout | None = None, *,
        config: dict[str, Any] | None = None, fingerprint: dict[str, str] | None = None,
        encode: Encode = lambda batch: batch, cost: Callable[[Any], tuple[int, int, float]] = lambda batch: (1, 0, 0.0),
        history: DataHistory | None = None, callbacks: Sequence[Callback] = (), deferred_check: bool | None = None,
        base: str | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.model, self.device = settings, model, device
        self.layout, self.fingerprint = layout or RankLayout(), fingerprint or {}
        self.history, self.callbacks = history or DataHistory(self.layout), list(callbacks)
        self.loader = PrefetchLoader(StepIndices(loader)) if isinstance(loader, int) else loader
        self.batches_per_step = settings.accumulation_steps * self.loader.ranks
        self.throughput = Throughput(device, settings.dtype, self.layout)
        self.optimization = Optimization(model, settings, device, self.layout, self._report, deferred_check)
        self.train_step = TrainStep(
            settings, loss, self.optimization, self.layout, encode,
            on_batch=lambda batch: self.throughput.add(*cost(batch)),
            roll_back=lambda: self.checkpoints.roll_back(self.folder),
        )  # fmt: skip
        self.config = {"model_type": settings.model["type"], **(config or getattr(model, "config", {}))}
        self.checkpoints = CheckpointManager(model, self.optimization, self.layout, base)
        self.stop_signals = StopSignals()
        self.step = 0
        self.batches_without_samples = 0  # since the last step
        self.stopped_by = 0  # the signal that ended the run
        self.saved: Path | None = None  # the checkpoint of the current step
        self._open_folder()
        self.tracker = Tracker(self.folder, settings, self.layout.is_main, self.step)
        self.synchronize = StepSynchronizer(self.layout, self.history.open(self.folder, self.resumed_from))

    # Opening and resuming

    def _open_folder(self) -> None:
        """Finds or creates the folder of the run, and resumes from a checkpoint if there is one."""
        self.lock = None
        self.schedule = Schedule(self.settings, self.loader.source, self.batches_per_step)

        def open_on_main() -> OpenedRun:
            opened = open_run(self.settings, self.checkpoints.verify, self._changes_since)
            self.lock = opened.lock
            return opened._replace(lock=None)

        opened = run_on_main(open_on_main, self.layout)
        self.folder, self.run_id, self.keep = opened.folder, opened.run.run, opened.run.keep_checkpoints
        self.resumed_from: Path | None = None  # the folder of the resumed run
        if opened.checkpoint is None:
            return
        running_states = self.checkpoints.load(opened.checkpoint)  # verified by the main rank
        if not opened.resumes:
            return
        self._resume(running_states)
        self.saved, self.resumed_from = opened.checkpoint, opened.checkpoint.parent
        if self.layout.is_main:
            copy_history(opened, self.step)
            if self.finished:
                logger.info("%s", self._summary())

    def _resume(self, states: RunningStates) -> None:
        self.step, self.schedule = states.global_step, self._schedule_from(states)
        self.loader.go_to(self.schedule.position)
        self.train_step.samples = states.global_step if states.samples is None else states.samples
        self.train_step.losses = [torch.tensor(loss, device=self.device) for loss in states.losses]
        if states.guard is not None:
            self.optimization.guard.load_state_dict(states.guard.model_dump())

    def _schedule_from(self, states: RunningStates) -> Schedule:
        """The schedule from a saved position on; from the end of the epoch if that has become shorter."""
        index = states.step * self.batches_per_step if states.index is None else states.index
        position = DataPosition(states.epoch, min(index, self.loader.source.count(states.epoch)))
        return Schedule(self.settings, self.loader.source, self.batches_per_step, states.global_step, position)

    def _changes_since(self, checkpoint: Path) -> list[str]:
        """Descriptions of the settings and data that changed since a checkpoint."""
        states = read_running_states(checkpoint)
        if states.fingerprint is None:
            return []
        now = {**self.fingerprint, **self._schedule_from(states).fingerprint()}
        explained = self.history.explain_changes(checkpoint.parent, states.fingerprint)
        return differences(states.fingerprint, now, explained)

    # Training

    def run(self) -> Path:
        """Trains to the last step, or until max_minutes have passed; returns the last checkpoint.

        After a stop signal, saves at the end of the step and raises SystemExit(128 + signal). Raises OpenSoraError when
        the loss or the weights are not finite, or when no sample could be read; earlier checkpoints stay.
        """
        started, first = time.monotonic(), self.step
        try:
            with self.stop_signals, self._progress_bar() as bar:
                self._train(bar, started)
                self.finish_pending()
                if not self.train_step.samples and not self.stopped_by:
                    raise OpenSoraError("no sample could be read, so nothing was trained or saved")
                if self.saved is None and self.train_step.samples:
                    self.saved = self.save()
        finally:
            self.loader.close()
            self.tracker.close()
            try:
                self.checkpoints.writer.wait()
            finally:
                if self.lock is not None:
                    self.lock.release()
        barrier(self.layout)  # torchrun ends all ranks when one ends, so none may end before everything is written
        if self.step > first or self.stopped_by:
            logger.log(logging.WARNING if self.stopped_by else logging.INFO, "%s", self._summary())
        if self.stopped_by:
            raise SystemExit(128 + self.stopped_by)
        assert self.saved is not None
        return self.saved

    def _train(self, bar: tqdm, started: float) -> None:
        """The training loop."""
        while not self.finished and not self._out_of_time(started):
            step = self._next_batches()
            if self.stopped_by:
                return
            self.saved = None
            if not step.samples:
                self._skip_batches()
                continue
            self.batches_without_samples = 0
            grad_norm = self.train_step(self.step, step.batches, step.samples, self.learning_rate(self.step))
            self.step += 1
            bar.update()
            if self.step % self.settings.log_every == 0:
                bar.set_postfix(loss=f"{self._log(grad_norm):.4f}")
            self._call_callbacks()
            if self.settings.ckpt_every and self.step % self.settings.ckpt_every == 0:
                self.saved = self.save()

    def _next_batches(self) -> StepBatches:
        """The batches of the next step. Sets `stopped_by` and keeps the position if a rank received a stop signal."""
        position, received = self.loader.position, self.stop_signals.received
        batches = [next(self.loader) for _ in range(self.settings.accumulation_steps)]
        step = self.synchronize(batches, stop=received > 0)
        if step.stop:
            self.stopped_by = max(all_gather_objects(received, self.layout))
            self.loader.position = position
        return step

    def _skip_batches(self) -> None:
        """Counts batches of which no sample could be read. Raises OpenSoraError after an epoch of them."""
        self.batches_without_samples += self.batches_per_step
        self.schedule.skipped_batches += self.batches_per_step
        epoch = self.loader.source.count(self.loader.position.epoch)
        if self.batches_without_samples > epoch + self.batches_per_step:
            raise OpenSoraError("no sample of a whole epoch could be read; check the files of the table")

    def finish_pending(self) -> None:
        """Waits until the last step has updated the weights."""
        self.train_step.finish_pending()

    def _call_callbacks(self) -> None:
        began = time.perf_counter()
        for callback in self.callbacks:
            callback(self)
        self.throughput.pause(time.perf_counter() - began)

    def save(self) -> Path:
        """Saves a checkpoint of the current step in the background. Raises OpenSoraError if weights are not finite."""
        self.finish_pending()
        if not self.checkpoints.weights_are_finite():
            raise self._broken_weights()
        position, losses = self.loader.position, self.train_step.losses
        states: dict[str, Any] = {
            "epoch": position.epoch, "step": position.batch // self.batches_per_step, "global_step": self.step,
            "batch_size": self.settings.batch_size, "index": position.batch, "samples": self.train_step.samples,
            "fingerprint": {**self.fingerprint, **self.schedule.fingerprint()},
            "guard": self.optimization.guard.state_dict(),
        }  # fmt: skip
        if losses:  # averaged over the ranks, as a run that resumes here has them
            self.train_step.losses = list(all_reduce_mean(torch.stack(losses), self.layout))
            states["losses"] = torch.stack(self.train_step.losses).tolist()
        return self.checkpoints.save(self.folder, self.config, states, self.keep, self.run_id)

    # Progress and reports

    @property
    def ema(self) -> EMA:
        """The averaged weights."""
        return self.optimization.ema

    @property
    def total_steps(self) -> int:
        """The number of steps of the whole run, without steps known to have no samples."""
        return self.schedule.total_steps

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        if self.settings.max_steps:
            return self.step >= self.settings.max_steps
        return self.loader.position.epoch >= self.settings.epochs

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant or half a cosine down to zero after the last step."""
        return self.schedule.learning_rate(step)

    def _out_of_time(self, started: float) -> bool:
        """Whether max_minutes have passed; several ranks agree on it in the steps that they log."""
        minutes = self.settings.max_minutes
        if not minutes or (self.layout.world_size > 1 and self.step % self.settings.log_every):
            return False
        return broadcast_object(time.monotonic() >= started + 60 * minutes, self.layout)

    def _progress_bar(self) -> tqdm:
        steps, hidden = self.schedule.expected_steps, self.layout.rank > 0
        return tqdm(total=steps, initial=self.step, unit="step", mininterval=5, disable=hidden)

    def _log(self, grad_norm: Tensor) -> float:
        """Logs and returns the mean loss since the last log line; NaN if the guard rejected all steps."""
        self.finish_pending()
        losses, self.train_step.losses = self.train_step.losses, []
        loss = all_reduce_mean(torch.stack(losses), self.layout).mean().item() if losses else math.nan
        line = {"step": self.step, "loss": loss} if losses else {"step": self.step}
        line |= {"lr": self.learning_rate(self.step - 1), "grad_norm": grad_norm.item()}
        self.tracker.step({**line, **self.throughput.line(self.loader.waited)})
        return loss

    def _report(self, line: dict[str, Any]) -> None:
        self.tracker.step(line)

    def _summary(self) -> str:
        """How the run ended, and how to resume it."""
        what = f"step {self.step} is done" + (f", saved in {self.saved}" if self.saved else ", nothing was saved")
        if self.stopped_by:
            what = f"ended by {signal_name(self.stopped_by)}: {what}"
        again = f"resume with --load {self.saved.parent}" if self.saved else "start again"
        if self.finished:
            name = "max_steps" if self.settings.max_steps else "epochs"
            again += f" and more {name} than {getattr(self.settings, name)} (--cfg-options {name}=...)"
        return f"{what}; {again}"

    def _broken_weights(self) -> OpenSoraError:
        self.checkpoints.writer.wait()
        good = checkpoints(self.folder)
        again = f"resume with --load {good[-1]} and --accept-changes" if good else "start again"
        return OpenSoraError(f"the weights are not finite at step {self.step}; {again}, with a lower lr or grad_clip")
