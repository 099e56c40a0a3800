"""What a stage is."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from functools import cached_property
from typing import Any, ClassVar

from opensora.curation.clip import Clip

Columns = dict[str, Any]  # column -> str, int, float or None


class Stage(ABC):
    """Computes columns of a clip. Subclasses are frozen dataclasses whose fields are their settings.

    Equal clips have equal columns: a stage reads the clip and its settings, nothing else, and keeps no state between
    clips but loaded models.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]  # that it adds
    splits: ClassVar[bool] = False  # whether it makes several clips of one

    def setup(self) -> None:  # noqa: B027  # most stages have no model
        """Loads models; called once per worker, before the first clip. Raises ConfigError or WeightsError."""

    @abstractmethod
    def process(self, clip: Clip) -> Columns | list[Columns]:
        """The columns of a clip; one dict per new clip if the stage splits. Raises MediaError for unusable clips."""

    def weights(self) -> Mapping[str, str]:
        """Name -> SHA-256 of the weights behind the columns."""
        return {}

    @property
    def provenance(self) -> dict[str, Any]:
        """Tool, settings and weights behind the columns, as recorded beside every value."""
        settings: dict[str, Any] = asdict(self) if is_dataclass(self) else {}
        return {"stage": self.name, "settings": settings, "weights": dict(self.weights()), "code": self._code_hash}

    @cached_property
    def stage_hash(self) -> str:
        """The hash of code, settings and weights: results under another one are computed again."""
        return hashlib.sha256(json.dumps(self.provenance, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def _code_hash(self) -> str:
        source = inspect.getsource(sys.modules[type(self).__module__])
        return hashlib.sha256(source.encode()).hexdigest()[:16]
