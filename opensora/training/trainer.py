"""The training loop, the same for autoencoders and diffusion models, on one rank or many.

Everything random in a step is drawn from generators keyed by (seed, step, batch of the step), and the data of a step
is a function of its place. A run can therefore be resumed anywhere, and repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from opensora.acceleration.device import (
    copied_alongside,
    optimizer_kernels,
    runs_ahead,
    training_attention,
    training_context,
)
from opensora.config.settings import TrainSettings
from opensora.distributed.fsdp import Layout, barrier, clip_grad_norm, gather, mean, of_main, share
from opensora.errors import OpenSoraError
from opensora.training.bad_step_guard import Guard, Question
from opensora.training.checkpoint import state
from opensora.training.checkpoint.fingerprint import differences
from opensora.training.checkpoint.saving import Saving
from opensora.training.data.loader import Feed, Numbered, Place
from opensora.training.data.position import Position, read_position
from opensora.training.data.turns import Turns, names_of
from opensora.training.ema import EMA
from opensora.training.optimizer import make_optimizer
from opensora.training.run_folder import carry_over, open_run
from opensora.training.schedule import Schedule
from opensora.training.stopping import Stopping, name_of
from opensora.training.throughput import Throughput
from opensora.training.tracking import Tracker

logger = logging.getLogger("opensora")
Loss = Callable[[Any, torch.Generator], Tensor]  # what the feed gives -> the loss of each sample [B], or of all
Watch = Callable[["Trainer"], None]


def step_generator(seed: int, step: int, batch: int = 0) -> torch.Generator:
    """The source of everything random in one batch of a training step, on the CPU."""
    key = f"train/{seed}/{step}" + (f"/{batch}" if batch else "")
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Taken(NamedTuple):
    """A step that the optimizer has taken, unless it was bad, and that the guard has yet to answer for."""

    step: int
    batches: list[Any]
    samples: int  # of all ranks
    loss: Tensor
    question: Question


class Trainer:
    """Trains `model`, which is ready for its ranks, on `loss(batch, generator) -> scalar Tensor` as the settings say.

    A number instead of a `feed` means batches that are nothing but their number, so many to an epoch. `prints` is the
    fingerprint that a resumed run is compared with; `work()` tells the clips, tokens and operations of the last batch.
    Batches that know their samples have `names` and a `weight`, 0 where nothing could be read; where that is so on all
    ranks, nothing is a step. `samples` counts those of the steps that were taken.
    `watches` are called after every step; those that come at other steps than the settings say call `settle` first.

    Where `late`, a device computes a step while the next one is prepared: whether it was bad is decided on the device,
    and read when the next step's gradients have been asked for. If it was, those are computed once more, afterwards.
    The numbers are those of a trainer that waits.
    """

    def __init__(
        self, settings: TrainSettings, model: nn.Module, loss: Loss, device: torch.device, feed: Feed | int,
        layout: Layout | None = None, prints: dict[str, str] | None = None,
        work: Callable[[], tuple[float, ...]] = lambda: (1,),
        explain: Callable[[Path, dict[str, str]], dict[str, str]] = lambda folder, saved: {},
    ) -> None:  # fmt: skip
        self.settings, self.model, self.loss, self.device = settings, model, loss, device
        self.layout, self.prints, self.work = layout or Layout(), prints or {}, work
        self.explain = explain  # the folder of a run and its fingerprint -> what has changed since, in words
        self.feed = Feed(Numbered(feed)) if isinstance(feed, int) else feed
        self.feed.placed = copied_alongside(device)
        self.turns = Turns(self.layout)
        self.batches = settings.accumulation_steps * self.feed.ranks  # of a step
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, settings, device)
        self.late = settings.dtype != "fp16" and optimizer_kernels(device)["fused"] and runs_ahead(device)
        self.taken: Taken | None = None
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "fp16")
        self.ema = EMA(model, settings.ema_decay)
        self.saving = Saving(model, self.parameters, self.ema, self.optimizer, self.scaler, self.layout)
        self.stopping = Stopping()
        self.step = self.samples = 0
        self.idle = 0  # batches since the last sample
        self.stopped = 0  # the signal that ended the run
        self.losses: list[Tensor] = []  # of the steps since the last line of the log
        self.saved: Path | None = None  # the checkpoint of the present position
        self.watches: list[Watch] = []
        self.guard = Guard(model, settings, self.layout, lambda line: self.tracker.step(line))
        self.throughput = Throughput(device, settings.dtype, self.layout)
        self._open()
        self.tracker = Tracker(self.folder, settings, self.layout.is_main, self.step)

    def _open(self) -> None:
        """Finds or makes the folder of the run, and takes what the checkpoint holds that it goes on from."""

        def on_main() -> Any:
            opened = open_run(self.settings, self.saving.check, self._differs)
            self.lock = opened.lock
            return opened._replace(lock=None)

        self.lock = None
        opened = of_main(on_main, self.layout)
        self.folder, self.run_id, self.kept = opened.folder, opened.run.run, opened.run.keep_checkpoints
        self.schedule = Schedule(self.settings, self.feed.source, self.batches)
        self.origin: Path | None = None  # the folder of the run that this one goes on from
        if opened.checkpoint is None:
            return
        position = self.saving.load(opened.checkpoint)  # the main rank has checked it
        if not opened.goes_on:
            return
        self._go_to(position)
        self.saved, self.origin = opened.checkpoint, opened.checkpoint.parent
        if self.layout.is_main:
            carry_over(opened, self.step)
            if self.finished:
                logger.info("%s", self._end())

    def _go_to(self, position: Position) -> None:
        self.step, self.schedule = position.global_step, self._schedule(position)
        self.samples = position.global_step if position.samples is None else position.samples
        self.feed.go_to(self.schedule.place)
        self.losses = [torch.tensor(loss, device=self.device) for loss in position.losses]
        if position.guard is not None:
            self.guard.load_state_dict(position.guard.model_dump())

    def _schedule(self, position: Position) -> Schedule:
        """The steps from a position on; with fewer data than before, from the end of its epoch on."""
        index = position.step * self.batches if position.index is None else position.index
        place = Place(position.epoch, min(index, self.feed.source.count(position.epoch)))
        return Schedule(self.settings, self.feed.source, self.batches, position.global_step, place)

    def _differs(self, checkpoint: Path) -> list[str]:
        """What makes a checkpoint that of another run."""
        position = read_position(checkpoint)
        now = {**self.prints, **self._schedule(position).prints()}
        if position.fingerprint is None:
            return []
        return differences(position.fingerprint, now, self.explain(checkpoint.parent, position.fingerprint))

    @property
    def total_steps(self) -> int:
        """The number of steps of the whole run, those without a sample left out as far as they are known."""
        return self.schedule.total_steps

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        if self.settings.max_steps:
            return self.step >= self.settings.max_steps
        return self.feed.place.epoch >= self.settings.epochs

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant or half a cosine down to zero after the last step."""
        return self.schedule.learning_rate(step)

    def run(self) -> Path:
        """Trains to the last step, or until max_minutes have passed; returns the last checkpoint's folder.

        A signal that asks for its end has it save at the end of the step, and raises SystemExit with 128 and its
        number. Raises OpenSoraError when the loss or the weights are no longer finite, or when there was no sample to
        train on; the checkpoints before that stay.
        """
        started, first = time.monotonic(), self.step
        try:
            with self.stopping, self._bar() as bar:
                self._train(bar, started)
                self.settle()
                if not self.samples and not self.stopped:
                    raise OpenSoraError("no sample was trained on: there was none that could be read; nothing is saved")
                if self.saved is None and self.samples:
                    self.saved = self.save()
        finally:
            self.feed.close()
            self.tracker.close()
            try:
                self.saving.writer.wait()
            finally:
                if self.lock is not None:
                    self.lock.release()
        barrier(self.layout)  # torchrun ends all ranks when one of them ends, so none does before all is written
        if self.step > first or self.stopped:
            logger.warning("%s", self._end()) if self.stopped else logger.info("%s", self._end())
        if self.stopped:
            raise SystemExit(128 + self.stopped)
        return self.saved

    def _bar(self) -> tqdm:
        how = dict(unit="step", mininterval=5, disable=self.layout.rank > 0)
        return tqdm(total=self.schedule.expected_steps, initial=self.step, **how)

    def _train(self, bar: tqdm, started: float) -> None:
        while not self.finished and not self._out_of_time(started):
            norm = self.train_step()
            if self.stopped:
                return
            self.saved = None
            if norm is None:
                continue
            self.step += 1
            bar.update()
            if self.step % self.settings.log_every == 0:
                bar.set_postfix(loss=f"{self._log(norm):.4f}")
            self._watch()
            if self.settings.ckpt_every and self.step % self.settings.ckpt_every == 0:
                self.saved = self.save()

    def _end(self) -> str:
        """How the run ended, and how it goes on."""
        what = f"step {self.step} is done" + (f", saved in {self.saved}" if self.saved else ", nothing was saved")
        if self.stopped:
            what = f"ended by {name_of(self.stopped)}: {what}"
        again = f"go on with --load {self.saved.parent}" if self.saved else "start again"
        if self.finished:
            name = "max_steps" if self.settings.max_steps else "epochs"
            again += f" and more {name} than {getattr(self.settings, name)} (--cfg-options {name}=...)"
        return f"{what}; {again}"

    def train_step(self) -> Tensor | None:
        """One optimizer step, unless the guard forbids it; returns the gradient norm.

        None where no rank has a sample, or where a rank was asked to end (`stopped`): nothing is done then.
        """
        place = self.feed.place
        asked, batches = self.stopping.asked, [next(self.feed) for _ in range(self.settings.accumulation_steps)]
        batches, samples, stops = self.turns(batches, asked > 0)
        if stops:
            self.stopped, self.feed.place = max(gather(asked, self.layout)), place
            return None
        if not samples:
            return self._pass_over()
        self.idle = 0
        loss = self._gradients(batches)
        if not self.settle():
            loss = self._gradients(batches)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm(self.parameters, self.settings.grad_clip or math.inf)
        self.taken = Taken(self.step, batches, samples, loss, self.guard.ask(loss, norm))
        if self.late:
            self.optimizer.found_inf = self.taken.question.bad  # its kernel does nothing where that is 1
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.settle()
        return norm

    def _pass_over(self) -> None:
        """Goes on after batches of which nothing could be read. Raises OpenSoraError after an epoch of them."""
        self.idle += self.batches
        self.schedule.left_out += self.batches
        if self.idle > self.feed.source.count(self.feed.place.epoch) + self.batches:
            raise OpenSoraError("no sample of a whole epoch could be read; check the files of the table")

    def settle(self) -> bool:
        """Waits for the last step and does what the guard says of it; False if that was bad, and gradients are lost."""
        taken, self.taken = self.taken, None
        if taken is None:
            return True
        with training_attention(self.device):
            verdict = self.guard.answer(taken.question, names_of(taken.batches), taken.step, lambda: self._again(taken))
        if not self.late:
            if verdict == "go":
                self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        if verdict == "go":
            self.samples += taken.samples
            self.ema.update()
            self.losses.append(taken.loss)
            return True
        self.optimizer.zero_grad(set_to_none=True)
        if verdict == "roll back":
            self.saving.roll_back(self.folder)
        return False

    def _gradients(self, batches: list[Any]) -> Tensor:
        """Adds up the gradients of this rank's batches of the step; returns their mean loss."""
        return torch.stack([self._backward(part, batch) for part, batch in enumerate(batches)]).mean()

    def _backward(self, part: int, batch: Any) -> Tensor:
        """Adds the gradients of batch number `part` of the step; returns its loss."""
        loss = self._loss(self.step, part, batch).mean()
        with training_attention(self.device):
            self.scaler.scale(loss / self.settings.accumulation_steps).backward()
        self.throughput.add(*self.work())
        return loss.detach()

    def _loss(self, step: int, part: int, batch: Any) -> Tensor:
        number = part * self.feed.ranks + self.feed.rank
        with training_context(self.device, self.settings.dtype):
            return self.loss(batch, step_generator(self.settings.seed, step, number))

    def _again(self, taken: Taken) -> Tensor:
        """The losses of a step's batches, computed once more: of each sample, if there are such."""
        losses = [self._loss(taken.step, part, batch) for part, batch in enumerate(taken.batches)]
        return torch.cat(losses) if losses[0].ndim else torch.stack(losses).mean()

    def _watch(self) -> None:
        if any(
            every and self.step % every == 0 for every in (self.settings.validate_every, self.settings.sample_every)
        ):
            self.settle()
        began = time.perf_counter()
        for watch in self.watches:
            watch(self)
        self.throughput.pause(time.perf_counter() - began)

    def save(self) -> Path:
        """Takes a checkpoint of the present position, to be written in the background; broken weights are refused."""
        self.settle()
        if not self.saving.is_finite():
            raise self._broken("the weights are")
        place, prints = self.feed.place, {**self.prints, **self.schedule.prints()}
        position = dict(epoch=place.epoch, step=place.index // self.batches, global_step=self.step)
        position |= dict(batch_size=self.settings.batch_size, index=place.index, samples=self.samples)
        position["fingerprint"] = prints
        position["guard"] = self.guard.state_dict()
        if self.losses:  # from here on their means, as in a run that is resumed here
            self.losses = list(mean(torch.stack(self.losses), self.layout))
            position["losses"] = torch.stack(self.losses).tolist()
        return self.saving.write(self.folder, self.settings.model["type"], position, self.kept, self.run_id)

    def _log(self, norm: Tensor) -> float:
        """Writes a line of the log with the mean loss since the last one, and returns that: NaN without a good step."""
        self.settle()
        loss = mean(torch.stack(self.losses), self.layout).mean().item() if self.losses else math.nan
        line = {"step": self.step, "loss": loss} if self.losses else {"step": self.step}
        self.losses = []
        line |= {"lr": self.learning_rate(self.step - 1), "grad_norm": norm.item()}
        self.tracker.step({**line, **self.throughput.line(self.feed.waited)})
        return loss

    def _out_of_time(self, started: float) -> bool:
        """Whether max_minutes are over; ranks agree on that when they log, since they wait for one another then."""
        minutes = self.settings.max_minutes
        if not minutes or (self.layout.world_size > 1 and self.step % self.settings.log_every):
            return False
        return share(time.monotonic() >= started + 60 * minutes, self.layout)

    def _broken(self, what: str) -> OpenSoraError:
        self.saving.writer.wait()
        good = state.checkpoints(self.folder)
        again = f"resume with --load {good[-1]} and --accept-changes" if good else "start again"
        return OpenSoraError(f"{what} not finite at step {self.step}; {again}, with a lower lr or grad_clip")
