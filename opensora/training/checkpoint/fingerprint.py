"""The fingerprint of a run: everything that decides its numbers, compared when it resumes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora.config.settings import TrainSettings
from opensora.errors import ConfigError

# Settings that change how a run is computed, logged or ended, but not its weights.
WITHOUT_EFFECT = {
    "outputs", "wandb", "load", "start_from_scratch", "accept_changes", "epochs", "max_steps", "max_minutes",
    "log_every", "ckpt_every", "keep_checkpoints", "num_workers", "device", "offline", "compile", "plugin", "sp_size",
    "grad_checkpoint", "resolution", "tensorboard", "validate_every", "sample_every", "sample_prompts", "on_bad_step",
    "max_bad_steps", "spike_factor", "validation_samples",
}  # fmt: skip
# Paths in sections; the content at the path is fingerprinted instead.
PATHS = {"from_pretrained", "data_path", "features", "cache_dir", "local_files_only", "shardformer", "subfolder"}
# Scheduler settings for sampling only; earlier versions saved them, too.
SAMPLING_ONLY = {"scheduler.cfg_scale", "scheduler.cfg_channel", "scheduler.ddim_eta", "scheduler.s_churn"}
NEW_ENTRIES = {"the length of the schedule", "steps of an epoch", "tokenizer"}  # earlier versions lack them
MAX_VALUE = 60  # characters of a value in a message


def fingerprint(settings: TrainSettings, **contents: str) -> dict[str, str]:
    """Name -> value of every setting that decides the numbers, and of `contents`: hashes of data and encoders."""
    fields = [field for field in dataclasses.fields(settings) if field.name not in WITHOUT_EFFECT]
    given = {field.name: getattr(settings, field.name) for field in fields}
    given = {name: value for name, value in given.items() if value != getattr(type(settings), name, None)}
    if settings.validate_every:
        given["validation_samples"] = settings.validation_samples  # held-out clips are not trained on
    if settings.lr_schedule == "cosine":
        given["max_steps"] = settings.max_steps  # the rate depends on it
    return {**_of_training(_flat(given)), **contents}


def content_of(path: str | Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def differences(saved: Mapping[str, str], now: Mapping[str, str], words: Mapping[str, str] | None = None) -> list[str]:
    """One sentence for each entry that differs, or the explanation in `words`.

    Entries that an earlier version did not record count as equal.
    """
    saved = _of_training(saved)
    names = sorted(name for name in {*saved, *now} if saved.get(name) != now.get(name))
    names = [name for name in names if name in saved or name not in NEW_ENTRIES]
    values = {name: f"{name} was {_shown(saved.get(name))} and is {_shown(now.get(name))}" for name in names}
    return [(words or {}).get(name, text) for name, text in values.items()]


def require_accepted(changes: list[str], accept: bool) -> list[str]:
    """Returns the changes. Raises ConfigError if there are any and `accept` is False."""
    if changes and not accept:
        remedy = "undo that, or continue with --accept-changes"
        raise ConfigError(f"the checkpoint is of another run: {'; '.join(changes)}; {remedy}")
    return changes


def _of_training(entries: Mapping[str, str]) -> dict[str, str]:
    """The entries without those for sampling only. IDDPM also trains on the timesteps of `num_sampling_steps`."""
    sampling = set(SAMPLING_ONLY)
    if entries.get("scheduler.type") == '"rflow"':
        sampling.add("scheduler.num_sampling_steps")
    return {name: text for name, text in entries.items() if name not in sampling}


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted name -> JSON, without paths."""
    if not isinstance(value, Mapping):
        return {prefix: json.dumps(value)}
    items = {str(key): item for key, item in value.items() if key not in PATHS}
    parts = (_flat(item, f"{prefix}.{key}" if prefix else key) for key, item in items.items())
    return {name: text for part in parts for name, text in part.items()}


def _shown(text: str | None) -> str:
    if text is None:
        return "not set"
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."
