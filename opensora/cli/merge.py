"""Merges flags into a configuration. Flags take precedence."""

from __future__ import annotations

import argparse
import ast
import copy
import logging
import secrets
from dataclasses import fields
from typing import Any

from opensora.cli.flags import SAMPLING_FLAGS, SECTION_FLAGS, TRAINING_FLAGS, merge_size_flags, option_of
from opensora.config import load_config
from opensora.config.settings import InferenceSettings, SearchSettings, Settings
from opensora.distributed.ranks import world_size
from opensora.errors import ConfigError

logger = logging.getLogger("opensora")

# Flags that also set a key of another section, if the configuration has it.
COPIES = {
    "ckpt_path": "discriminator.from_pretrained",
    "num_frames": "dataset.num_frames",
    "image_size": "dataset.image_size",
}


def settings_of(kind: type[Settings], args: argparse.Namespace) -> Settings:
    """The settings of the configuration `args.config` with the parsed flags merged in. Raises ConfigError."""
    merge_size_flags(args)
    config, path = load_config(args.config, args.trust_config)
    merged = merge(config, args)
    if kind is InferenceSettings:
        _draw_seed(merged)
        _warn_of_ignored(merged, _given(args))
    return kind.from_config(merged, path.name)


def merge(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A copy of `config` with every flag of `args` that is set (not None) merged in.

    Raises ConfigError when a flag sets a key of a section that the configuration lacks.
    """
    merged = copy.deepcopy(config)
    merge_size_flags(args)
    given = _given(args)
    settings = {field.name for field in (*fields(InferenceSettings), *fields(SearchSettings))}
    merged |= {name: value for name, value in given.items() if name in settings}
    if "prompt_path" in given and "prompt" not in given:
        merged.pop("prompt", None)  # the configuration's prompts would win over the file
    for name, (_, _, target) in (SECTION_FLAGS | SAMPLING_FLAGS | TRAINING_FLAGS).items():
        if name in given and not _set_key(merged, target, given[name]):
            section = target.partition(".")[0]
            raise ConfigError(f"{option_of(name)} sets {target}, but the configuration has no {section}")
    for name in COPIES.keys() & given.keys():
        _set_key(merged, COPIES[name], given[name])
    for option in args.cfg_options or []:
        _apply_option(merged, option)
    return merged


def _given(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if value is not None}


def _set_key(config: dict[str, Any], target: str, value: Any) -> bool:
    """Sets `section.key` and returns True if the configuration has that section."""
    section, key = target.split(".")
    if section == "lora":
        config[section] = {**(config.get(section) or {}), key: value}
        return True
    if isinstance(config.get(section), dict):
        config[section][key] = value
    elif section == "dataset" and key in config:
        config[key] = value  # 1.0 has the data settings at the top level
    else:
        return False
    return True


def _apply_option(config: dict[str, Any], option: str) -> None:
    """Sets one dotted `key=value`; the value is a Python literal, or else a string."""
    path, equals, text = option.partition("=")
    *sections, key = path.split(".")
    if not equals or not all((*sections, key)):
        raise ConfigError(f"--cfg-options takes key=value, such as model.depth=4; it got {option!r}")
    for section in sections:
        config = config.setdefault(section, {})
        if not isinstance(config, dict):
            raise ConfigError(f"--cfg-options {option}: '{section}' is not a section")
    try:
        config[key] = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        config[key] = text


def _draw_seed(merged: dict[str, Any]) -> None:
    """Replaces the seed -1 by a random one and logs it."""
    if merged.get("seed") != -1 or isinstance(merged["seed"], bool):
        return
    if world_size() > 1:
        raise ConfigError("seed -1 would differ between ranks; set a seed under torchrun")
    merged["seed"] = secrets.randbelow(2**31)
    logger.info("seed %d was drawn", merged["seed"])


def _warn_of_ignored(merged: dict[str, Any], given: dict[str, Any]) -> None:
    """Warns of settings that have no effect because another one takes precedence."""
    size = merged.get("image_size")
    asked = given.keys() & {"resolution", "aspect_ratio"} or ("resolution" in merged and "image_size" not in given)
    if size and asked:
        logger.warning("image_size %s decides the size; resolution and aspect_ratio have no effect", size)
    if merged.get("save_fps") and given.keys() & {"fps", "frame_interval"} and "save_fps" not in given:
        logger.warning("videos are saved at save_fps %s; --save-fps changes it, --fps does not", merged["save_fps"])
    if (words := given.get("unquoted")) and "prompts" not in given:
        note = f"{len(words)} prompts of one word each make {len(words)} results; quote a prompt of several words"
        logger.warning("%s", note)
