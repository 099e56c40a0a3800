"""Translates arguments of the Python interface, in this project's or diffusers' names, to settings."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from opensora.checkpoints.builder import config_json
from opensora.checkpoints.hub import locate
from opensora.config import find_config, load_config
from opensora.config.model_zoo import MODELS
from opensora.config.schema import shown
from opensora.config.settings import InferenceSettings
from opensora.errors import ArgumentError, ConfigError
from opensora.pipeline.argument_names import (
    ALIASES,
    CALL_SETTINGS,
    MEDIA,
    MODEL_SETTINGS,
    SIZE,
    WEIGHTS,
    changes_of,
    check_names,
)
from opensora.pipeline.in_memory_media import InMemoryMedia, media_sources

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
    check_names(given, [*known, *ALIASES, *WEIGHTS, "height", "width"])
    config.pop("prompt", None)
    config.pop("prompt_path", None)
    return InferenceSettings.from_config({**config, **changes_of(config, given)}, source)


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
    check_names(given, [*CALL_SETTINGS, *ALIASES, *SIZE])
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
    changes = changes_of(dataclasses.asdict(settings), given)
    return dataclasses.replace(settings, **{**changes, **sources}), media


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
