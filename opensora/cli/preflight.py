"""Checks of the other verbs that run before torch is imported, which takes seconds: missing files, unknown models.

Whatever passes here is checked again where it is used. Requests are checked by `opensora.pipeline.job_spec`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from opensora import registry
from opensora.config.sections import check_type
from opensora.config.settings import TrainSettings
from opensora.distributed.ranks import ranks
from opensora.errors import ConfigError, MediaError, WeightsError


def check_training(settings: TrainSettings, connecting: bool = True) -> None:
    """Raises for unknown components and a missing table. `connecting`: the ranks need the address of rank 0."""
    ranks(connecting)
    known = {"model": {**registry.MODELS, **registry.AUTOENCODERS}, "scheduler": registry.SCHEDULERS}
    known |= {"vae": registry.AUTOENCODERS, "text_encoder": registry.TEXT_ENCODERS}
    for name, table in known.items():
        if section := getattr(settings, name):
            check_type(name, section["type"], table)
    data_path = (settings.dataset or {}).get("data_path")
    if isinstance(data_path, str) and data_path and not _exists(data_path):
        raise ConfigError(f"{data_path}: no such table; check data_path")


def check_drafts(files: Iterable[str]) -> None:
    """Raises WeightsError for a missing draft."""
    for file in files:
        if not _exists(file):
            remedy = "give the .draft.safetensors file that generate wrote"
            raise WeightsError(f"{file}: no such draft; {remedy}")


def check_exists(file: str) -> None:
    """Raises MediaError for a missing file or folder."""
    if not _exists(file):
        raise MediaError(f"{file}: no such file or folder")


def _exists(name: str) -> bool:
    try:
        return bool(name) and (Path(name).exists() or Path(name).expanduser().exists())
    except (OSError, ValueError, RuntimeError):  # too long, no home
        return False
