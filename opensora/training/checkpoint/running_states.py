"""`running_states.json` of a checkpoint: where in its data a run is, validated on reading."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from opensora.config.schema import Count, Name, NonNegative, Number, Positive, Schema, Text, check
from opensora.errors import WeightsError
from opensora.files import read_json

FILE = "running_states.json"
MAX_COUNT = 10**12
BoundedCount = Annotated[Count, Field(le=MAX_COUNT)]


class GuardState(Schema):
    """`BadStepGuard.state_dict()`."""

    norms: Annotated[list[NonNegative], Field(max_length=10_000)]
    in_a_row: BoundedCount
    overflows: BoundedCount


class RunningStates(Schema):
    """Progress of a run: `index` batches of `epoch` and `global_step` steps are done, on `samples` samples.

    step: optimizer steps of this epoch
    losses: of the steps since the last log line
    """

    epoch: Annotated[Count, Field(le=10**9)]
    step: BoundedCount
    global_step: BoundedCount
    batch_size: Positive | None = None
    index: BoundedCount | None = None
    fingerprint: dict[Name, Text] | None = None
    guard: GuardState | None = None
    losses: Annotated[list[Number], Field(max_length=1_000_000, default_factory=list)]
    samples: Count | None = None


def read_running_states(folder: Path) -> RunningStates:
    """The progress saved in a checkpoint; unknown keys are ignored. Raises WeightsError when the file is damaged."""
    path = folder / FILE
    value = read_json(path, WeightsError)
    if isinstance(value, dict):
        value = {name: one for name, one in value.items() if name in RunningStates.model_fields}
    return check(RunningStates, value, str(path), WeightsError, "it is damaged; try an older checkpoint")
