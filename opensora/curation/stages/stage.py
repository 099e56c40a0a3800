"""What a stage is."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import Field, field, fields, is_dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from opensora.curation.clip import Clip
from opensora.curation.stages.code_hash import code_hash

Columns = dict[str, Any]  # column -> str, int, float or None
Place = Literal["processor", "accelerator", "server"]


def execution_setting(default: Any) -> Any:
    """A setting that says how a stage runs, not what it computes: it is no part of the stage's hash."""
    return field(default=default, metadata={"execution": True})


class Stage(ABC):
    """Computes columns of a clip. Subclasses are frozen dataclasses whose fields are their settings.

    Equal clips have equal columns: a stage reads the clip, its settings and the columns in `inputs`, nothing else, and
    keeps no state between clips but loaded models.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]  # that it adds
    splits: ClassVar[bool] = False  # whether it makes several clips of one
    inputs: ClassVar[tuple[str, ...]] = ()  # columns of earlier stages or of the input that it reads

    @property
    def place(self) -> Place:
        """Where its work is done: on processors, by a model on an accelerator, or by a server."""
        return "processor"

    @property
    def num_workers(self) -> int | None:
        """How many workers run it at once on a machine; None: as many as the executor has."""
        return None

    @property
    def max_items(self) -> int | None:
        """The most clips that it takes in one run; None: all."""
        return None

    def check(self) -> None:
        """Checks settings, packages and files before the first worker starts. Raises as `setup` does."""
        self.setup()

    def setup(self) -> None:  # noqa: B027  # most stages have no model
        """Loads models; called once per worker, before the first clip. Raises ConfigError or WeightsError."""

    @abstractmethod
    def process(self, clip: Clip) -> Columns | list[Columns]:
        """The columns of a clip; one dict per new clip if the stage splits. Raises MediaError for unusable clips."""

    def completed(self, columns: Columns, row: Mapping[str, Any]) -> Columns:
        """The stored columns of a clip as they stand in the table, given the row before this stage."""
        return columns

    def weights(self) -> Mapping[str, str]:
        """Name -> SHA-256 of the weights behind the columns."""
        return {}

    @property
    def provenance(self) -> dict[str, Any]:
        """Tool, settings and weights behind the columns, as recorded beside every value."""
        known: tuple[Field[Any], ...] = fields(self) if is_dataclass(self) else ()
        settings = {one.name: getattr(self, one.name) for one in known if not one.metadata.get("execution")}
        return {"stage": self.name, "settings": settings, "weights": dict(self.weights()), "code": self.code}

    @property
    def code(self) -> str:
        """Names the code behind the columns: another one computes them again."""
        return code_hash(type(self).__module__)

    @cached_property
    def stage_hash(self) -> str:
        """The hash of code, settings and weights: results under another one are computed again."""
        return hashlib.sha256(json.dumps(self.provenance, sort_keys=True).encode()).hexdigest()[:16]
