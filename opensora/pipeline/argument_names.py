"""The names of arguments of Python calls and served requests, and the settings that they change. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from opensora.config.schema import shown
from opensora.config.settings import InferenceSettings
from opensora.errors import ArgumentError, ConfigError, did_you_mean
from opensora.pipeline.request import PARTS

# Settings that are fixed when a pipeline is loaded; all others belong to a request.
MODEL_SETTINGS = frozenset((
    *PARTS, "device", "dtype", "cpu_dtype", "offline", "linear", "attention", "memory", "compile", "graphs",
    "guidance_ranks",
))  # fmt: skip
# Argument -> setting; `section.key` sets one key of a section. All other arguments have the names of their settings.
ALIASES = {
    "num_inference_steps": "scheduler.num_sampling_steps",
    "num_sampling_steps": "scheduler.num_sampling_steps",
    "steps": "scheduler.num_sampling_steps",
    "guidance_scale": "scheduler.cfg_scale",
    "cfg_scale": "scheduler.cfg_scale",
    "loops": "loop",
    "num_videos_per_prompt": "num_sample",
}
WEIGHTS = {  # arguments of `opensora.load`
    "ckpt_path": "model.from_pretrained",
    "vae_path": "vae.from_pretrained",
    "text_encoder_path": "text_encoder.from_pretrained",
}
MEDIA = ("image", "first_frame", "last_frame", "extend", "edit")
SIZE = ("height", "width", "generator")  # arguments that become other settings
# Settings of files, programs and drafts, which a call does not take.
FILE_SETTINGS = frozenset((
    "save_dir", "output", "overwrite", "prompt_path", "prompt_as_path", "start_index", "end_index", "sample_name",
    "preview", "verbose", "draft", "steps_until", "outputs", "num_workers", "dataset", "perceptual_loss_weight",
    "kl_loss_weight", "prompt_generator",
))  # fmt: skip
CALL_SETTINGS = (
    frozenset(field.name for field in dataclasses.fields(InferenceSettings)) - MODEL_SETTINGS - FILE_SETTINGS
)


def changes_of(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Setting -> new value, for arguments that change the settings of `config`."""
    given = dict(given)
    changes: dict[str, Any] = {}
    owners: dict[str, str] = {}
    height, width = given.pop("height", None), given.pop("width", None)
    if (height is None) != (width is None):
        raise ArgumentError(f"{'width' if height is None else 'height'} alone is not a size; give height and width")
    if height is not None:
        if "image_size" in given:
            raise ArgumentError("height and width set the size, and so does image_size; keep one")
        given["image_size"] = (height, width)
    elif ("resolution" in given or "aspect_ratio" in given) and "image_size" not in given:
        changes["image_size"] = None
    for name, value in given.items():
        target = {**ALIASES, **WEIGHTS}.get(name, name)
        if other := owners.get(target):
            raise ArgumentError(f"{other} and {name} are the same setting; give one of the two")
        owners[target] = name
        section, _, key = target.partition(".")
        if not key:
            changes[target] = value
        elif config.get(section) is None:
            raise ConfigError(f"{name} sets {target}, but the configuration has no {section}")
        else:
            changes[section] = {**changes.get(section, config[section]), key: value}
    return changes


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ArgumentError for a name that is not known."""
    known = sorted(known)
    for name in given:
        if name not in known:
            raise ArgumentError(f"unknown argument {shown(name)}{did_you_mean(name, known)}")
