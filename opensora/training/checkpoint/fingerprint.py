"""What decides the numbers of a run, in a form that a later run can be compared with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora.config.settings import TrainSettings
from opensora.errors import ConfigError

# Settings that change how a run is computed, logged or ended, but not its numbers.
FREE = {
    "outputs", "wandb", "load", "start_from_scratch", "accept_changes", "epochs", "max_steps", "max_minutes",
    "log_every", "ckpt_every", "keep_checkpoints", "num_workers", "device", "offline", "compile", "plugin", "sp_size",
    "grad_checkpoint", "resolution", "tensorboard", "validate_every", "sample_every", "sample_prompts", "on_bad_step",
    "max_bad_steps", "spike_factor", "validation_samples",
}  # fmt: skip
# Keys of sections that say where something lies; its content counts in their place.
PLACES = {"from_pretrained", "data_path", "features", "cache_dir", "local_files_only", "shardformer", "subfolder"}
# Settings of a scheduler that only samples depend on; also found in what earlier versions saved.
OF_SAMPLES = {"scheduler.cfg_scale", "scheduler.cfg_channel", "scheduler.ddim_eta"}
ADDED = {"the length of the schedule", "steps of an epoch", "tokenizer"}  # what earlier versions did not record
SHOWN = 60  # characters of a value in a message


def fingerprint(settings: TrainSettings, **contents: str) -> dict[str, str]:
    """Name -> value of every setting that decides the numbers, and of the `contents` that it works on."""
    fields = [field for field in dataclasses.fields(settings) if field.name not in FREE]
    given = {field.name: getattr(settings, field.name) for field in fields}
    given = {name: value for name, value in given.items() if value != getattr(type(settings), name, None)}
    if settings.validate_every:
        given["validation_samples"] = settings.validation_samples  # they are not trained on
    if settings.lr_schedule == "cosine":
        given["max_steps"] = settings.max_steps  # the rate depends on it
    return {**_of_training(_flat(given)), **contents}


def content_of(path: str | Path) -> str:
    """The hash of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def differences(saved: Mapping[str, str], now: Mapping[str, str], words: Mapping[str, str] | None = None) -> list[str]:
    """What differs, one sentence a setting, or what `words` say of it.

    What an earlier version did not record counts as the same.
    """
    saved = _of_training(saved)
    names = sorted(name for name in {*saved, *now} if saved.get(name) != now.get(name))
    names = [name for name in names if name in saved or name not in ADDED]
    values = {name: f"{name} was {_shown(saved.get(name))} and is {_shown(now.get(name))}" for name in names}
    return [(words or {}).get(name, text) for name, text in values.items()]


def require_accepted(changes: list[str], accept: bool) -> list[str]:
    """The changes, if there are none or they are accepted. Raises ConfigError with them otherwise."""
    if changes and not accept:
        remedy = "undo that, or go on with --accept-changes"
        raise ConfigError(f"the checkpoint is of another run: {'; '.join(changes)}; {remedy}")
    return changes


def compare(
    saved: Mapping[str, str], now: Mapping[str, str], accept: bool, words: Mapping[str, str] | None = None
) -> list[str]:
    """What differs. Raises ConfigError with it unless it is accepted."""
    return require_accepted(differences(saved, now, words), accept)


def _of_training(prints: Mapping[str, str]) -> dict[str, str]:
    """Without what only samples depend on; IDDPM trains on the timesteps that `num_sampling_steps` keeps, too."""
    left_out = OF_SAMPLES | ({"scheduler.num_sampling_steps"} if prints.get("scheduler.type") == '"rflow"' else set())
    return {name: text for name, text in prints.items() if name not in left_out}


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted name -> JSON, of all that is no place."""
    if not isinstance(value, Mapping):
        return {prefix: json.dumps(value)}
    items = {str(key): item for key, item in value.items() if key not in PLACES}
    parts = (_flat(item, f"{prefix}.{key}" if prefix else key) for key, item in items.items())
    return {name: text for part in parts for name, text in part.items()}


def _shown(text: str | None) -> str:
    if text is None:
        return "not set"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
