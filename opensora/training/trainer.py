"""The training loop, the same for autoencoders and diffusion models.

Everything random in step n is drawn from a generator keyed by (seed, n), and the data of step n is a function of n.
The position of a run is therefore one integer, and a resumed run repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from opensora.acceleration.device import training_context
from opensora.errors import OpenSoraError
from opensora.settings import TrainSettings
from opensora.training import state
from opensora.training.ema import EMA

Loss = Callable[[int, torch.Generator], Tensor]


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of everything random in one training step, on the CPU."""
    digest = hashlib.blake2b(f"train/{seed}/{step}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Trainer:
    """Trains `model` on `loss(step, generator) -> scalar Tensor` as the settings say.

    `steps_per_epoch` only names positions (epoch E, step within it).
    """

    def __init__(
        self, settings: TrainSettings, model: nn.Module, loss: Loss, device: torch.device, steps_per_epoch: int
    ) -> None:
        self.settings, self.model, self.loss, self.device = settings, model, loss, device
        self.steps_per_epoch = max(steps_per_epoch, 1)
        self.total_steps = settings.max_steps or settings.epochs * self.steps_per_epoch
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        adam = dict(betas=settings.adam_betas, eps=settings.adam_eps, weight_decay=settings.weight_decay, fused=True)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, **adam)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "fp16")
        self.ema = EMA(model, settings.ema_decay)
        self.step = 0
        self.losses: list[Tensor] = []  # of the steps since the last line of the log
        self.saved: Path | None = None  # the checkpoint of the present position
        self.folder = self._open()

    def _open(self) -> Path:
        """The experiment folder: the one that `load` points into, with its state restored, or a new one.

        A run that does not go on where the newest checkpoint of its folder ends gets a new folder too.
        """
        new = partial(state.experiment_folder, self.settings.outputs, self.settings.model["type"])
        if self.settings.load is None:
            return new()
        checkpoint = state.find_checkpoint(self.settings.load).resolve()
        position = state.load(checkpoint, self.model, self.ema, self.optimizer, self.scaler)
        if self.settings.start_from_scratch:
            return new()
        self.step = position["global_step"]
        self.losses = [torch.tensor(loss, device=self.device) for loss in position.get("losses", ())]
        self.saved = checkpoint
        old = checkpoint.parent
        folder = old if state.checkpoints(old)[-1:] == [checkpoint] else new()
        _copy_log(old / "log.jsonl", folder / "log.jsonl", self.step)
        return folder

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
        started, first = time.monotonic(), self.step
        deadline = started + 60 * self.settings.max_minutes if self.settings.max_minutes else math.inf
        with tqdm(total=self.total_steps, initial=self.step, unit="step", dynamic_ncols=True, mininterval=5) as bar:
            while self.step < self.total_steps and time.monotonic() < deadline:
                loss, norm = self.train_step()
                self.losses.append(loss)
                self.step += 1
                self.saved = None
                bar.update()
                if self.step % self.settings.log_every == 0:
                    rate = (self.step - first) / (time.monotonic() - started)
                    bar.set_postfix(loss=f"{self._log(norm, rate):.4f}")
                if self.settings.ckpt_every and self.step % self.settings.ckpt_every == 0:
                    self.saved = self.save()
        self.saved = self.saved or self.save()
        return self.saved

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns the loss and the gradient norm, both still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        with training_context(self.device, self.settings.dtype):
            loss = self.loss(self.step, step_generator(self.settings.seed, self.step))
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        return loss.detach(), norm

    def save(self) -> Path:
        """Writes a checkpoint of the present position; broken weights are refused."""
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.parameters]))
        if not norms.isfinite().all():
            raise self._broken("the weights are")
        epoch, step = divmod(self.step, self.steps_per_epoch)
        position = dict(epoch=epoch, step=step, global_step=self.step, batch_size=self.settings.batch_size)
        if self.losses:
            position["losses"] = torch.stack(self.losses).tolist()
        config = {"model_type": self.settings.model["type"], **getattr(self.model, "config", {})}
        keep = self.settings.keep_checkpoints
        return state.save(self.folder, self.model, config, self.ema, self.optimizer, self.scaler, position, keep)

    def _log(self, norm: Tensor, rate: float) -> float:
        """Appends the mean loss since the last line to log.jsonl, and returns it."""
        loss = torch.stack(self.losses).mean().item()
        if not math.isfinite(loss):
            raise self._broken("the loss is")
        self.losses = []
        line = {"step": self.step, "loss": loss, "lr": self.learning_rate(self.step - 1)}
        line |= {"grad_norm": norm.item(), "steps_per_s": round(rate, 3)}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return loss

    def _broken(self, what: str) -> OpenSoraError:
        good = state.checkpoints(self.folder)
        again = f"resume with --load {good[-1]}" if good else "start again"
        return OpenSoraError(f"{what} not finite at step {self.step}; {again}, with a lower lr or grad_clip")


def _copy_log(old: Path, new: Path, step: int) -> None:
    """Copies the log without the lines of steps that a resumed run will take again; both paths may be one file."""
    if old.is_file():
        # A line that is cut off is the last one, of a run that was killed while writing it.
        lines = [line for line in old.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        state.replace_text(new, "".join(line for line in lines if json.loads(line)["step"] <= step))
