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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.acceleration.device import autocast
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

    `steps_per_epoch` only names positions (epoch E, step within it). `on_log(step)` runs after each line of the log.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: nn.Module,
        loss: Loss,
        device: torch.device,
        steps_per_epoch: int,
        model_type: str,
        on_checkpoint: Callable[[int, EMA, Path], None] | None = None,
    ) -> None:
        self.settings, self.model, self.loss, self.device = settings, model, loss, device
        self.steps_per_epoch = max(steps_per_epoch, 1)
        self.total_steps = settings.max_steps or settings.epochs * self.steps_per_epoch
        self.on_checkpoint = on_checkpoint
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            betas=settings.adam_betas,
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "fp16")
        self.ema = EMA(model, settings.ema_decay)
        self.step = 0
        self.folder = self._open(model_type)

    def _open(self, model_type: str) -> Path:
        """The experiment folder: a new one, or the one that `load` points into, with its state restored."""
        source = self.settings.load
        if source is None:
            return state.experiment_folder(self.settings.outputs, model_type)
        checkpoint = state.find_checkpoint(source)
        position = state.load(str(checkpoint), self.model, self.ema, self.optimizer, self.scaler)
        if not self.settings.start_from_scratch:
            self.step = position["global_step"]
        _cut_log(checkpoint.parent / "log.jsonl", self.step)
        return checkpoint.parent

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
        """Trains to the last step, or until max_minutes have passed; returns the last checkpoint's folder."""
        from tqdm import tqdm

        started, first = time.monotonic(), self.step
        deadline = started + 60 * self.settings.max_minutes if self.settings.max_minutes else math.inf
        saved = None
        losses: list[Tensor] = []
        with tqdm(total=self.total_steps, initial=self.step, unit="step", dynamic_ncols=True, mininterval=5) as bar:
            while self.step < self.total_steps and time.monotonic() < deadline:
                loss, norm = self.train_step()
                losses.append(loss)
                self.step += 1
                bar.update()
                if self.step % self.settings.log_every == 0:
                    rate = (self.step - first) / (time.monotonic() - started)
                    bar.set_postfix(loss=f"{self._log(losses, norm, rate):.4f}")
                    losses = []
                if self.settings.ckpt_every and self.step % self.settings.ckpt_every == 0:
                    saved = self.save()
        if saved is None or self.step % self.settings.ckpt_every:
            saved = self.save()
        return saved

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns the loss and the gradient norm, both still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        with autocast(self.device, self.settings.dtype) or nullcontext():
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
        """Writes a checkpoint of the present position."""
        epoch, step = divmod(self.step, self.steps_per_epoch)
        position = {
            "epoch": epoch, "step": step, "global_step": self.step, "batch_size": self.settings.batch_size,
        }  # fmt: skip
        folder = state.save(
            self.folder, self.model, self.ema, self.optimizer, self.scaler, position, self.settings.keep_checkpoints
        )
        if self.on_checkpoint is not None:
            self.on_checkpoint(self.step, self.ema, self.folder)
        return folder

    def _log(self, losses: list[Tensor], norm: Tensor, rate: float) -> float:
        """Appends the mean of `losses` since the last line to log.jsonl, and returns it."""
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise OpenSoraError(
                f"the loss is {loss} at step {self.step}; resume from {self.folder} with a lower lr or grad_clip"
            )
        line: dict[str, Any] = {
            "step": self.step, "loss": loss, "lr": self.learning_rate(self.step - 1), "grad_norm": norm.item(),
            "steps_per_s": round(rate, 3),
        }  # fmt: skip
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return loss


def _cut_log(path: Path, step: int) -> None:
    """Drops the lines of steps that a resumed run will take again."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in lines))
