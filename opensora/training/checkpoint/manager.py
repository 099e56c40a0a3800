"""Saves the state of a run to checkpoints, and loads it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora.distributed.collectives import all_reduce_mean, run_on_main
from opensora.distributed.fsdp import local_shard
from opensora.distributed.process_group import RankLayout
from opensora.training.checkpoint import folders, restore
from opensora.training.checkpoint.running_states import RunningStates
from opensora.training.checkpoint.snapshot import take_snapshot
from opensora.training.checkpoint.write import BackgroundWriter
from opensora.training.optimization import Optimization
from opensora.training.run_folder import newest_intact


class CheckpointManager:
    """Checkpoints of a model and its optimization. All ranks call its methods together unless stated otherwise."""

    def __init__(
        self, model: nn.Module, optimization: Optimization, layout: RankLayout, base: str | None = None
    ) -> None:
        self.model, self.optimization, self.layout = model, optimization, layout
        self.base = base  # SHA-256 of the weights that an adapter belongs to
        self.writer = BackgroundWriter()

    def verify(self, checkpoint: Path) -> None:
        """Raises WeightsError unless a checkpoint is intact and fits the model. One rank may call it alone."""
        restore.check_fit(restore.read_checkpoint(checkpoint), self.model, self.optimization.parameters)

    def load(self, checkpoint: Path) -> RunningStates:
        """Loads a checkpoint that a rank has verified; returns where the run is."""
        saved, own = restore.read_checkpoint(checkpoint, verify_hashes=False), self.optimization
        restore.load_into(saved, self.model, own.ema, own.optimizer, own.scaler)
        return saved.running_states

    def roll_back(self, folder: Path) -> None:
        """Loads the newest intact checkpoint of a run folder, if there is one."""

        def newest() -> Path | None:
            self.writer.wait()
            found = folders.checkpoints(folder)[::-1]
            return newest_intact(found, self.verify) if found else None

        if checkpoint := run_on_main(newest, self.layout):
            self.load(checkpoint)

    def weights_are_finite(self) -> bool:
        """Whether all trained weights are finite, on all ranks."""
        norms = torch.stack(torch._foreach_norm([local_shard(one.detach()) for one in self.optimization.parameters]))
        return bool(all_reduce_mean(norms, self.layout).isfinite().all())

    def save(self, folder: Path, config: dict[str, Any], running_states: dict[str, Any], keep: int, run: str) -> Path:
        """Copies the state and writes it in the background, after the previous checkpoint; returns its folder."""
        self.writer.wait()
        own = self.optimization
        state = take_snapshot(self.model, own.ema, own.optimizer, own.scaler, self.layout, self.base)
        if state is not None:
            self.writer.write(folder, state, config, running_states, keep, run)
        return folders.checkpoint_folder(folder, running_states)
