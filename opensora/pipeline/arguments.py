"""Translates arguments of the Python interface, in this project's or diffusers' names, to settings."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from opensora.checkpoints.builder import config_json
from opensora.checkpoints.hub import locate
from opensora.config import find_config, load_config
from opensora.config.model_zoo import MODELS
from opensora.config.schema import shown
from opensora.config.settings import InferenceSettings
from opensora.errors import ArgumentError, ConfigError, did_you_mean
from opensora.pipeline.in_memory_media import InMemoryMedia, media_sources
from opensora.pipeline.loaded_models import MODEL_SETTINGS

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
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "float64"}


def collect_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that are settings: the names ones that are not None, and all of `settings`."""
    names = set(arguments) - {"self", "callback_on_step_end", "output_type", "settings"}
    return {name: arguments[name] for name in names if arguments[name] is not None} | arguments["settings"]


def load_settings(
    name: str, device: str | torch.device | None, dtype: str | torch.dtype | None, given: Mapping[str, Any]
) -> InferenceSettings:
    """The settings of a pipeline, which are the defaults of its calls. Raises ConfigError or WeightsError."""
    config, source = _find_configuration(str(name))
    if device is not None:
        config["device"] = str(device)
    given = {**given, **({} if dtype is None else {"dtype": dtype})}
    if "torch_dtype" in given:
        given["dtype"] = given.pop("torch_dtype")
    if isinstance(given.get("dtype"), torch.dtype):
        given["dtype"] = DTYPES.get(given["dtype"], str(given["dtype"]))
    known = (CALL_SETTINGS | MODEL_SETTINGS) - {"prompt", *MEDIA}
    _check_names(given, [*known, *ALIASES, *WEIGHTS, "height", "width"])
    config.pop("prompt", None)
    config.pop("prompt_path", None)
    return InferenceSettings.from_config({**config, **_changes(config, given)}, source)


def call_settings(
    settings: InferenceSettings, given: Mapping[str, Any]
) -> tuple[InferenceSettings, list[InMemoryMedia]]:
    """The settings of a call of a pipeline with `settings`, and the media in memory that they name.

    Raises ArgumentError for an argument that is unknown or given twice, ConfigError for its value, MediaError.
    """
    if fixed := sorted(MODEL_SETTINGS & given.keys() - {"scheduler"}):
        raise ArgumentError(
            f"{fixed[0]} is fixed when the models are loaded; give it to opensora.load(..., {fixed[0]}=...)"
        )
    _check_names(given, [*CALL_SETTINGS, *ALIASES, *SIZE])
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(given.get("prompt"), str):
        given["prompt"] = [given["prompt"]]
    if not given.get("prompt"):
        raise ArgumentError("no prompt given; pass a string or a list of strings")
    sources, media = media_sources(**{name: given.pop(name) for name in MEDIA if name in given})
    generator = given.pop("generator", None)
    if generator is not None:
        if "seed" in given:
            raise ArgumentError("seed and generator exclude each other; give one")
        given["seed"] = _draw_seed(generator)
    if given.get("seed") == -1:
        given["seed"] = secrets.randbelow(2**31)
    changes = _changes(dataclasses.asdict(settings), given)
    return dataclasses.replace(settings, **{**changes, **sources}), media


def _changes(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
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


def _check_names(given: Iterable[str], known: Iterable[str]) -> None:
    known = sorted(known)
    for name in given:
        if name not in known:
            raise ArgumentError(f"unknown argument {shown(name)}{did_you_mean(name, known)}")


def _draw_seed(generator: torch.Generator) -> int:
    """A seed drawn from a generator, which this advances."""
    if not isinstance(generator, torch.Generator):
        raise ArgumentError(f"generator must be a torch.Generator; it is {shown(generator)}")
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))


def _find_configuration(name: str) -> tuple[dict[str, Any], str]:
    """The configuration of a name, and its name in error messages.

    For a folder of weights or a hub id it is that of the model type in its config.json.
    """
    try:
        find_config(name)
    except ConfigError:
        if not (Path(name).expanduser().is_dir() or name.count("/") == 1):
            raise
    else:
        config, path = load_config(name)
        return config, path.name
    model_type = str(config_json(locate(name, what="model")).get("model_type", ""))
    for entry in MODELS:
        if model_type and entry.name.partition("-XL")[0].lower() == model_type.lower():
            config, _ = load_config(entry.name)
            config["model"] = {**config["model"], "from_pretrained": name}
            return config, name
    raise ConfigError(f"{name}: its config.json names no known model type; give a configuration and ckpt_path={name!r}")
