"""Where a run is: `running_states.json` of a checkpoint, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from opensora.config.schema import Count, Name, NonNegative, Number, Positive, Schema, Text, check
from opensora.errors import WeightsError
from opensora.files import read_json

FILE = "running_states.json"
MANY = 10**12
Bounded = Annotated[Count, Field(le=MANY)]


class GuardState(Schema):
    """`Guard.state_dict()`."""

    norms: Annotated[list[NonNegative], Field(max_length=10_000)]
    in_a_row: Bounded
    overflows: Bounded


class Position(Schema):
    """`index` batches of an epoch are done, and `global_step` steps of the run, on so many `samples`."""

    epoch: Annotated[Count, Field(le=10**9)]
    step: Bounded
    global_step: Bounded
    batch_size: Positive | None = None
    index: Bounded | None = None
    fingerprint: dict[Name, Text] | None = None
    guard: GuardState | None = None
    losses: Annotated[list[Number], Field(max_length=1_000_000, default_factory=list)]
    samples: Count | None = None


def read_position(folder: Path) -> Position:
    """The position that was saved with a checkpoint. Raises WeightsError when it is damaged; unknown keys are left."""
    path = folder / FILE
    value = read_json(path, WeightsError)
    if isinstance(value, dict):
        value = {name: one for name, one in value.items() if name in Position.model_fields}
    return check(Position, value, str(path), WeightsError, "it is damaged; try an older checkpoint")
