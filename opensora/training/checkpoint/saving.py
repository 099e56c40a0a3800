"""What a run keeps of itself: model, averages and optimizer, written to checkpoints and taken from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.distributed.fsdp import Layout, local, mean, of_main
from opensora.training.checkpoint import restore, state
from opensora.training.data.position import Position
from opensora.training.ema import EMA
from opensora.training.run_folder import newest_whole


class Saving:
    """The parts of a run that a checkpoint holds. All ranks call its methods together, if not said otherwise."""

    def __init__(
        self, model: nn.Module, parameters: list[Tensor], ema: EMA, optimizer: Any, scaler: Any, layout: Layout
    ) -> None:
        self.model, self.parameters, self.layout = model, parameters, layout
        self.ema, self.optimizer, self.scaler = ema, optimizer, scaler
        self.writer = state.Writer()

    def check(self, checkpoint: Path) -> None:
        """Raises WeightsError unless a checkpoint is whole and fits; of any rank by itself."""
        restore.check_fit(restore.read(checkpoint), self.model, self.parameters)

    def load(self, checkpoint: Path) -> Position:
        """Takes everything from a checkpoint that a rank has checked; its position."""
        saved = restore.read(checkpoint, hashes=False)
        restore.fill_in(saved, self.model, self.ema, self.optimizer, self.scaler)
        return saved.position

    def roll_back(self, folder: Path) -> None:
        """Takes everything from the newest checkpoint of a folder, if there is one."""

        def newest() -> Path | None:
            self.writer.wait()
            found = state.checkpoints(folder)[::-1]
            return newest_whole(found, self.check) if found else None

        if good := of_main(newest, self.layout):
            self.load(good)

    def is_finite(self) -> bool:
        """Whether the weights are."""
        norms = torch.stack(torch._foreach_norm([local(one.detach()) for one in self.parameters]))
        return bool(mean(norms, self.layout).isfinite().all())

    def write(self, folder: Path, model_type: str, position: dict[str, Any], keep: int, run: str) -> Path:
        """Has a checkpoint of a position written in the background, once the last one is; its folder."""
        self.writer.wait()
        taken = state.snapshot(self.model, self.ema, self.optimizer, self.scaler, self.layout)
        if taken is not None:
            config = {"model_type": model_type, **getattr(self.model, "config", {})}
            self.writer.write(folder, taken, config, position, keep, run)
        return state.checkpoint_folder(folder, position)
