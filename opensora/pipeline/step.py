"""A step of the sampler as callers see it: what its clip will look like, and a file to resume it from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from opensora.pipeline import draft
from opensora.pipeline.decode import decode
from opensora.pipeline.generation import StepEnd
from opensora.pipeline.job import Job
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.request import Request


class Step:
    """A step that has been taken. Rows are the requests of its batch."""

    def __init__(self, models: LoadedModels, job: Job, end: StepEnd) -> None:
        self._models, self._job, self._end = models, job, end

    @property
    def requests(self) -> list[Request]:
        """The requests that are denoised together."""
        return self._end.batch

    @property
    def done(self) -> int:
        """Steps taken, over all clips of the result."""
        return self._end.loop * self._end.state.num_steps + self._end.state.step

    @property
    def total(self) -> int:
        """Steps that the result takes: those of all its clips, or of a draft."""
        return self._job.stop or self._job.settings.loop * self._end.state.num_steps

    @property
    def can_resume(self) -> bool:
        """Whether `save` writes a state to resume from: within the first clip, before its last step or a draft's."""
        return self._end.loop == 0 and self._end.state.step < (self._job.stop or self._end.state.num_steps)

    def frames(self, row: int = 0) -> np.ndarray:
        """The predicted clip of a row, uint8 [T, H, W, 3]; takes as long as decoding a result."""
        with torch.inference_mode():
            return decode(self._models, self._job, self._end.state.x0[row : row + 1]).frames

    def save(self, row: int, file: Path) -> None:
        """Writes the state of a row as a draft file; a job that continues it gives the bytes of an undisturbed one."""
        state, request, only = self._end.state, self._end.batch[row], slice(row, row + 1)
        carry = {name: tensor[only] for name, tensor in state.carry.items()}
        alone = replace(state, x=state.x[only], x0=state.x0[only], carry=carry)
        recipe, device = self._job.recipe(request, self._models), str(self._models.device)
        draft.save(file, Path(request.path).name, recipe, alone, self._end.generators[row].get_state(), device)
