"""The interface for programs: train a model, encode a table, export weights.

A configuration is a name below `configs/`, a path, a dict, or settings. Keyword arguments override it; a dict is merged
into the section of that name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from opensora import registry
from opensora.acceleration.precision import DTYPES
from opensora.checkpoints.summary import Summary
from opensora.config import load_config, merge_configs
from opensora.config.settings import ExtractSettings, TrainSettings
from opensora.errors import ConfigError, did_you_mean
from opensora.training.checkpoint import export as export_module
from opensora.training.result import TrainResult

Config: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | TrainSettings"
S = TypeVar("S", bound=TrainSettings)


def train(config: Config, **overrides: Any) -> TrainResult:
    """Trains a diffusion model, or an autoencoder if the configuration's model is one. Runs under torchrun, too.

    `load` resumes a run: its folder, one of its checkpoints, or "auto". The averaged weights are exported when the last
    step is done. Raises OpenSoraError; a stop signal saves a checkpoint and raises SystemExit.

        result = train("embedded/train/finetune", dataset={"data_path": "videos.csv"}, max_steps=100)
        result.model  # outputs/ema, ready for inference
    """
    settings = settings_of(TrainSettings, config, overrides)
    if settings.model["type"] in registry.AUTOENCODERS:
        from opensora.training.autoencoder import train_vae

        return train_vae(settings)
    from opensora.training import diffusion

    return diffusion.train(settings)


def extract(config: Config, **overrides: Any) -> Path:
    """Encodes the videos and captions of a table for training without encoders; returns the features folder.

    Resumes at the first missing shard. Raises OpenSoraError.
    """
    from opensora.training.feature_extraction import extract as extraction

    return extraction.extract(settings_of(ExtractSettings, config, overrides))


def export(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], *, ema: bool = True, dtype: str | None = None
) -> Summary:
    """Writes a model for inference, config.json and model.safetensors, from a run, a checkpoint or a model folder.

    `ema` takes the averaged weights; `dtype` is "bf16", "fp16", "fp32", or None for that of the source. Raises
    WeightsError and ConfigError.
    """
    return export_module.export(Path(source), Path(destination), ema, _dtype(dtype))


def settings_of(kind: type[S], config: Config, overrides: Mapping[str, Any]) -> S:
    """The settings of a configuration with overrides. Raises ConfigError for unknown or wrong ones."""
    if isinstance(config, TrainSettings):
        if not isinstance(config, kind):
            raise ConfigError(f"these are {type(config).__name__}; give {kind.__name__}, or a configuration")
        if unknown := sorted(overrides.keys() - (known := {field.name for field in fields(config)})):
            raise ConfigError(f"unknown setting '{unknown[0]}'{did_you_mean(unknown[0], known)}")
        sections = {name: getattr(config, name) for name in overrides}
        return replace(config, **merge_configs(sections, dict(overrides)))
    if isinstance(config, Mapping):
        return kind.from_config(merge_configs(dict(config), dict(overrides)), "the configuration")
    values, path = load_config(os.fspath(config))
    return kind.from_config(merge_configs(values, dict(overrides)), path.name)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not known; choose {', '.join(DTYPES)}")
    return DTYPES[name]
