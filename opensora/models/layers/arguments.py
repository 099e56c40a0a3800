"""A constructor's arguments as a model's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRAINING_ONLY = ("freeze", "freeze_y_embedder", "only_train_temporal", "drop_path")


def arguments_of(scope: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for config.json, from the `locals()` of a constructor's first statement; lists become tuples."""
    left_out = ("self", "__class__", *TRAINING_ONLY)
    return {key: tuple(v) if isinstance(v, list) else v for key, v in scope.items() if key not in left_out}
