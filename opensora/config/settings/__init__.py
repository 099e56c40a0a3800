"""Settings of a run: frozen, validated dataclasses built from a configuration.

Each field declares its default, bounds, flag and documentation once; `docs/config.md` is generated from them. Sizes and
durations stay as written ("480p", "4s"); `opensora.datasets.aspect` resolves them.
"""

from opensora.config.fields import Settings, setting
from opensora.config.settings.inference import InferenceSettings
from opensora.config.settings.training import (
    NOT_YET_IN_TRAINING,
    NOT_YET_IN_VAE_TRAINING,
    ExtractSettings,
    SearchSettings,
    TrainSettings,
    check_trainable,
)

__all__ = [
    "NOT_YET_IN_TRAINING",
    "NOT_YET_IN_VAE_TRAINING",
    "ExtractSettings",
    "InferenceSettings",
    "SearchSettings",
    "Settings",
    "TrainSettings",
    "check_trainable",
    "setting",
]
