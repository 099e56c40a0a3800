"""The fields of a request: OpenAI's, and the settings of `opensora generate` by name, out of JSON or a form.

The values of a form are texts; they are converted like flags. Values are checked where settings are made.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from opensora.config.settings import InferenceSettings
from opensora.errors import ArgumentError, ConfigError, did_you_mean
from opensora.pipeline.argument_names import ALIASES

# Settings that a request may give. A new setting is refused until it is listed here.
SETTINGS = frozenset((
    "prompt", "negative_prompt", "seed", "num_frames", "image_size", "resolution", "aspect_ratio", "fps",
    "frame_interval", "save_fps", "aes", "flow", "camera_motion", "loop", "condition_frame_length",
    "condition_frame_edit", "align", "mask_strategy", "keep", "strength", "watermark", "cache", "max_error",
    "cache_threshold", "cache_prompts", "guidance_interval", "draft", "steps_until",
    "lora",
))  # fmt: skip
MEDIA = ("image", "first_frame", "last_frame", "extend", "edit", "reference_path")
# Settings that name files, addresses or devices of the server, or that the server chooses.
REFUSED = frozenset((
    "fuse_lora", "any_base",
    "model", "vae", "text_encoder", "scheduler", "dataset", "dtype", "device", "offline", "num_workers",
    "perceptual_loss_weight", "kl_loss_weight", "save_dir", "output", "overwrite", "prompt_path", "prompt_as_path",
    "allow_downloads", "prompt_generator", "llm_refine", "llm_base_url", "llm_model", "refined", "start_index",
    "end_index", "num_sample", "sample_name", "batch_size", "multi_resolution", "preview", "verbose", "cache_table",
    "cache_psnr", "guidance_ranks", "attention", "cpu_dtype", "linear", "memory", "compile", "graphs", "outputs",
))  # fmt: skip
OWN = ("model", "size", "seconds", "input_reference", "width", "height")  # fields that are no settings by name
NAMES = frozenset((*SETTINGS, *(name for name in ALIASES if name != "num_videos_per_prompt"), *OWN, *MEDIA))
MAX_DIGITS = 40

_FIELDS = {field.name: field for field in dataclasses.fields(InferenceSettings)}


def values_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The given values of a request's fields without `model` and media, converted to the types of their settings.

    An empty text is no value. Raises ConfigError for a field that is unknown or refused.
    """
    check_names(fields)
    given = {}
    for name, raw in fields.items():
        if name in MEDIA or name in ("model", "input_reference") or raw is None or (raw == "" and name != "prompt"):
            continue
        given[name] = _value(name, raw)
    return given


def check_names(fields: Mapping[str, Any]) -> None:
    """Raises ConfigError for a field that is unknown, or that a request may not set."""
    for name in fields:
        if name not in NAMES:
            if name in REFUSED or name == "num_videos_per_prompt":
                raise ConfigError(f"{name} is chosen by the server, not by requests; remove it")
            raise ArgumentError(f"unknown field {name[:80]!r}{did_you_mean(name, NAMES) or '; remove it'}")


def _value(name: str, raw: Any) -> Any:
    kind = _kind(name)
    if kind.startswith("Sequence"):
        return raw if isinstance(raw, list) else [raw]
    if isinstance(raw, list):
        return [_of_text(kind.removeprefix("tuple[").split(",")[0], one) for one in raw]
    if kind.startswith("tuple") and isinstance(raw, str):
        return [_of_text(kind.removeprefix("tuple[").split(",")[0], one) for one in re.split(r"[\s,x×]+", raw.strip())]
    return _of_text(kind, raw)


def _kind(name: str) -> str:
    """The type of a field, as the annotation of its setting writes it."""
    if name in ("steps", "num_inference_steps", "num_sampling_steps", "width", "height"):
        return "int"
    if name in ("cfg_scale", "guidance_scale", "seconds"):
        return "float"
    if name == "size":
        return "str"
    if name == "prompt":
        return "str"
    return str(_FIELDS[ALIASES.get(name, name)].type)


def _of_text(kind: str, raw: Any) -> Any:
    """A text of a form as a value of a type; what cannot be converted stays a text, which the checks refuse."""
    if not isinstance(raw, str):
        return raw
    text, kinds = raw.strip(), kind.split(" | ")
    if "bool" in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if "int" in kinds and "str" not in kinds and re.fullmatch(rf"[+-]?[0-9]{{1,{MAX_DIGITS}}}", text):
        return int(text)
    if "float" in kinds and len(text) <= MAX_DIGITS:
        try:
            return float(text)
        except ValueError:
            return raw
    return raw
