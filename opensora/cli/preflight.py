"""What can be refused before the large libraries are loaded, which takes seconds: missing files, unknown models.

These checks are a first look: whatever they let pass is checked where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opensora import registry
from opensora.checkpoints.hub import EMBEDDED, SUFFIXES, locate
from opensora.config.settings import InferenceSettings, TrainSettings
from opensora.distributed.ranks import ranks
from opensora.errors import ConfigError, MediaError, WeightsError
from opensora.pipeline.prompts import load_prompts
from opensora.pipeline.request import PARTS, check_sections, make_size

GIVEN = ("image", "first_frame", "last_frame", "extend", "edit")


def check_request(settings: InferenceSettings) -> None:
    """Raises what a request would be refused for: its sections, size and prompts, files that are not there."""
    ranks(connecting=True)
    check_sections(settings)
    make_size(settings)
    if not settings.prompt and not settings.prompt_path:
        raise ConfigError("there is no prompt: give one, or --prompt-path with a file of prompts")
    if not settings.prompt:
        load_prompts(settings.prompt_path)
    _check_references(settings)
    for part in PARTS:
        _check_path(getattr(settings, part), part)


def check_training(settings: TrainSettings, connecting: bool = True) -> None:
    """Raises what a training, or a search or an extraction (whose ranks need no connection), would be refused for."""
    ranks(connecting)
    known = {"model": {**registry.MODELS, **registry.AUTOENCODERS}, "scheduler": registry.SCHEDULERS}
    known |= {"vae": registry.AUTOENCODERS, "text_encoder": registry.TEXT_ENCODERS}
    for name, table in known.items():
        if section := getattr(settings, name):
            registry.check_type(name, section["type"], table)
    table = (settings.dataset or {}).get("data_path")
    if isinstance(table, str) and table and not _is_there(table):
        raise ConfigError(f"{table}: there is no such table; check data_path")


def check_drafts(files: Iterable[str]) -> None:
    """Raises WeightsError for a draft that is not there."""
    for file in files:
        if not _is_there(file):
            remedy = "give the .draft.safetensors file that generate wrote"
            raise WeightsError(f"{file}: there is no such draft; {remedy}")


def check_exists(file: str) -> None:
    """Raises MediaError for a file or folder that is not there."""
    if not _is_there(file):
        raise MediaError(f"{file}: no such file or folder")


def _check_references(settings: InferenceSettings) -> None:
    sources = [getattr(settings, name) for name in GIVEN]
    sources += [one for entry in settings.reference_path or () for one in entry.split(";")]
    for source in filter(None, sources):
        if "://" not in source and not _is_there(source) and not _is_there(source.rpartition("#")[0]):
            raise MediaError(f"reference {source!r}: no such file; give another")


def _check_path(section: Mapping[str, Any], part: str) -> None:
    """Raises WeightsError for weights that can only be a path, and are not there."""
    source = section.get("from_pretrained")
    if not isinstance(source, str) or "/" not in source or source.startswith(EMBEDDED):
        return
    if source.count("/") > 1 or source.endswith(SUFFIXES) or source.startswith((".", "/", "~")):
        locate(source, what=part, offline=True)


def _is_there(name: str) -> bool:
    try:
        return bool(name) and (Path(name).exists() or Path(name).expanduser().exists())
    except (OSError, ValueError, RuntimeError):  # too long, no home
        return False
