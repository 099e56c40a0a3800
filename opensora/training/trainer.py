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
from opensora.acceleration.host_group import HostGroup
from opensora.acceleration.parallel import Layout, clip_grad_norm, local, mean, share
from opensora.errors import OpenSoraError
from opensora.settings import TrainSettings
from opensora.training import state
from opensora.training.data import Feed, Numbered, Place
from opensora.training.ema import EMA
from opensora.training.fingerprint import compare
from opensora.training.guard import Guard, Question
from opensora.training.throughput import Throughput
from opensora.training.tracking import Tracker, copy_log
from opensora.training.turns import Turns

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
    loss: Tensor
    question: Question


class Trainer:
    """Trains `model`, which is ready for its ranks, on `loss(batch, generator) -> scalar Tensor` as the settings say.

    A number instead of a `feed` means batches that are nothing but their number, so many to an epoch. `prints` is the
    fingerprint that a resumed run is compared with; `work()` tells the clips, tokens and operations of the last batch.
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
        self.turns = Turns(HostGroup(self.layout))
        self.batches = settings.accumulation_steps * self.feed.ranks  # of a step
        self.steps_per_epoch = max(self.feed.source.count(0) // self.batches, 1)
        self.total_steps = settings.max_steps or settings.epochs * self.steps_per_epoch
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, settings, device)
        self.late = settings.dtype != "fp16" and optimizer_kernels(device)["fused"] and runs_ahead(device)
        self.taken: Taken | None = None
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "fp16")
        self.ema = EMA(model, settings.ema_decay)
        self.writer = state.Writer()
        self.step = 0
        self.losses: list[Tensor] = []  # of the steps since the last line of the log
        self.saved: Path | None = None  # the checkpoint of the present position
        self.origin: Path | None = None  # the folder of the run that this one goes on from
        self.watches: list[Watch] = []
        self.guard = Guard(model, settings, self.layout, lambda line: self.tracker.step(line))
        self.throughput = Throughput(device, settings.dtype, self.layout)
        self.folder = self._open()
        self.tracker = Tracker(self.folder, settings, self.layout.is_main, self.step)

    def _open(self) -> Path:
        """The experiment folder: the one that `load` points into, with its state restored, or a new one.

        A run that does not go on where the newest checkpoint of its folder ends gets a new folder too.
        """
        if self.settings.load is None:
            return self._new_folder()
        checkpoint = share(state.find_checkpoint(self.settings.load).resolve(), self.layout)
        position = state.read_position(checkpoint)
        if not self.settings.start_from_scratch and "fingerprint" in position:
            words = self.explain(checkpoint.parent, position["fingerprint"])
            for change in compare(position["fingerprint"], self.prints, self.settings.accept_changes, words):
                logger.warning("going on although %s", change)
        state.load(checkpoint, self.model, self.ema, self.optimizer, self.scaler)
        if self.settings.start_from_scratch:
            return self._new_folder()
        self.step, self.saved, self.origin = position["global_step"], checkpoint, checkpoint.parent
        self.feed.go_to(Place(position["epoch"], position.get("index", position["step"] * self.batches)))
        self.losses = [torch.tensor(loss, device=self.device) for loss in position.get("losses", ())]
        if "guard" in position:
            self.guard.load_state_dict(position["guard"])
        newest = share(state.checkpoints(checkpoint.parent)[-1:] == [checkpoint], self.layout)
        folder = checkpoint.parent if newest else self._new_folder()
        if self.layout.is_main:
            copy_log(checkpoint.parent / "log.jsonl", folder / "log.jsonl", self.step)
        return folder

    def _new_folder(self) -> Path:
        made = self.layout.is_main and state.experiment_folder(self.settings.outputs, self.settings.model["type"])
        return share(made, self.layout)

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        if self.settings.max_steps:
            return self.step >= self.settings.max_steps
        return self.feed.place.epoch >= self.settings.epochs

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant or half a cosine down to zero at the last step."""
        warmup = self.settings.warmup_steps or 0
        if step < warmup:
            return self.settings.lr * (step + 1) / (warmup + 1)
        if self.settings.lr_schedule == "constant":
            return self.settings.lr
        progress = min((step - warmup) / max(self.total_steps - warmup, 1), 1.0)
        return self.settings.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def run(self) -> Path:
        """Trains to the last step, or until max_minutes have passed; returns the last checkpoint's folder.

        Raises OpenSoraError when the loss or the weights are no longer finite; the checkpoints before that stay.
        """
        started = time.monotonic()
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", mininterval=5, disable=self.layout.rank > 0)
        try:
            while not self.finished and not self._out_of_time(started):
                norm = self.train_step()
                if norm is None:
                    continue
                self.step += 1
                self.saved = None
                bar.update()
                if self.step % self.settings.log_every == 0:
                    bar.set_postfix(loss=f"{self._log(norm):.4f}")
                self._watch()
                if self.settings.ckpt_every and self.step % self.settings.ckpt_every == 0:
                    self.saved = self.save()
            self.saved = self.saved or self.save()
        finally:
            bar.close()
            self.feed.close()
            self.tracker.close()
            self.writer.wait()
        return self.saved

    def train_step(self) -> Tensor | None:
        """One optimizer step, unless the guard forbids it; returns the gradient norm. None if no rank has a sample."""
        batches, samples = self.turns([next(self.feed) for _ in range(self.settings.accumulation_steps)])
        if not samples:
            return None
        loss = self._gradients(batches)
        if not self.settle():
            loss = self._gradients(batches)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm(self.parameters, self.settings.grad_clip or math.inf)
        self.taken = Taken(self.step, batches, loss, self.guard.ask(loss, norm))
        if self.late:
            self.optimizer.found_inf = self.taken.question.bad  # its kernel does nothing where that is 1
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.settle()
        return norm

    def settle(self) -> bool:
        """Waits for the last step and does what the guard says of it; False if that was bad, and gradients are lost."""
        taken, self.taken = self.taken, None
        if taken is None:
            return True
        with training_attention(self.device):
            verdict = self.guard.answer(taken.question, _names(taken.batches), taken.step, lambda: self._again(taken))
        if not self.late:
            if verdict == "go":
                self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        if verdict == "go":
            self.ema.update()
            self.losses.append(taken.loss)
            return True
        self.optimizer.zero_grad(set_to_none=True)
        if verdict == "roll back":
            self._roll_back()
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

    def _roll_back(self) -> None:
        """Takes weights and optimizer from the last checkpoint, if there is one; the data goes on."""
        self.writer.wait()
        if good := share(state.checkpoints(self.folder)[-1:], self.layout):
            state.load(good[0], self.model, self.ema, self.optimizer, self.scaler)

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
        norms = torch.stack(torch._foreach_norm([local(p.detach()) for p in self.parameters]))
        if not mean(norms, self.layout).isfinite().all():
            raise self._broken("the weights are")
        place = self.feed.place
        position = dict(epoch=place.epoch, step=place.index // self.batches, global_step=self.step)
        position |= dict(batch_size=self.settings.batch_size, index=place.index, fingerprint=self.prints)
        position["guard"] = self.guard.state_dict()
        if self.losses:  # from here on their means, as in a run that is resumed here
            self.losses = list(mean(torch.stack(self.losses), self.layout))
            position["losses"] = torch.stack(self.losses).tolist()
        self.writer.wait()
        taken = state.snapshot(self.model, self.ema, self.optimizer, self.scaler, self.layout)
        if taken is not None:
            config = {"model_type": self.settings.model["type"], **getattr(self.model, "config", {})}
            self.writer.write(self.folder, taken, config, position, self.settings.keep_checkpoints)
        return state.checkpoint_folder(self.folder, position)

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
        self.writer.wait()
        good = state.checkpoints(self.folder)
        again = f"resume with --load {good[-1]} and --accept-changes" if good else "start again"
        return OpenSoraError(f"{what} not finite at step {self.step}; {again}, with a lower lr or grad_clip")


def make_optimizer(parameters: list[Tensor], settings: TrainSettings, device: torch.device) -> torch.optim.AdamW:
    """AdamW as the settings have it, by the fastest kernels of the device, whatever those of a checkpoint are."""
    how = dict(betas=settings.adam_betas, eps=settings.adam_eps, weight_decay=settings.weight_decay)
    kernels = optimizer_kernels(device)
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, **how, **kernels)

    def keep_kernels(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        return {**saved, "param_groups": [{**group, **kernels} for group in saved["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(keep_kernels)
    return optimizer


def _names(batches: list[Any]) -> list[str]:
    """Of the samples of a step's batches, where they have names."""
    found = [batch["names"] if isinstance(batch, dict) else getattr(batch, "names", ()) for batch in batches]
    return [name for names in found for name in names]
