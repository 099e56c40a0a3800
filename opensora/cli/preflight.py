"""Checks that run before torch is imported, which takes seconds: missing files, unknown models, wrong sizes.

Whatever passes here is checked again where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opensora import registry
from opensora.checkpoints.hub import EMBEDDED, SUFFIXES, locate
from opensora.config.sections import check_type
from opensora.config.settings import InferenceSettings, TrainSettings
from opensora.distributed.ranks import ranks
from opensora.errors import ConfigError, MediaError, WeightsError
from opensora.pipeline.prompts import load_prompts
from opensora.pipeline.request import PARTS, check_sections, make_size

MEDIA_SETTINGS = ("image", "first_frame", "last_frame", "extend", "edit")


def check_request(settings: InferenceSettings) -> None:
    """Raises for wrong sections, a wrong size, missing prompts and missing files."""
    ranks(connecting=True)
    check_sections(settings)
    make_size(settings)
    if not settings.prompt:
        if not settings.prompt_path:
            raise ConfigError("no prompt given: give one, or --prompt-path with a file of prompts")
        load_prompts(settings.prompt_path)
    _check_references(settings)
    for part in PARTS:
        _check_path(getattr(settings, part), part)


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


def _check_references(settings: InferenceSettings) -> None:
    sources = [getattr(settings, name) for name in MEDIA_SETTINGS]
    sources += [one for entry in settings.reference_path or () for one in entry.split(";")]
    for source in filter(None, sources):
        if "://" not in source and not _exists(source) and not _exists(source.rpartition("#")[0]):
            raise MediaError(f"reference {source!r}: no such file; give another")


def _check_path(section: Mapping[str, Any], part: str) -> None:
    """Raises WeightsError if `from_pretrained` can only be a path, and that path is missing."""
    source = section.get("from_pretrained")
    if not isinstance(source, str) or "/" not in source or source.startswith(EMBEDDED):
        return
    if source.count("/") > 1 or source.endswith(SUFFIXES) or source.startswith((".", "/", "~")):
        locate(source, what=part, offline=True)


def _exists(name: str) -> bool:
    try:
        return bool(name) and (Path(name).exists() or Path(name).expanduser().exists())
    except (OSError, ValueError, RuntimeError):  # too long, no home
        return False
