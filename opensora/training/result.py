"""What a training run returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """A finished or interrupted run.

    folder: of the run, `outputs/NNN-MODEL`: log, checkpoints, samples
    step: optimizer steps done
    checkpoint: the last one, to resume from
    model: folder of the averaged model, ready for inference; None until the last step is done
    """

    folder: Path
    step: int
    checkpoint: Path | None = None
    model: Path | None = None

    @property
    def path(self) -> Path:
        """The model if there is one, else the checkpoint to resume from, else the folder of the run."""
        return self.model or self.checkpoint or self.folder
