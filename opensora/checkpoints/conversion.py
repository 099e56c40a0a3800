"""Converts checkpoints between file formats, dtypes and layouts: published ones to ours, and back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from opensora import registry
from opensora.acceleration.model_parts import kept_in_float32
from opensora.acceleration.precision import DTYPES
from opensora.checkpoints import builder
from opensora.checkpoints.fit import check_finite, fit
from opensora.checkpoints.hub import locate
from opensora.checkpoints.key_mapping import POSITIONS, TensorDict, to_original
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.save import save_file, save_pretrained
from opensora.checkpoints.summary import Summary, summarize
from opensora.config import load_config
from opensora.config.sections import check_type
from opensora.errors import ConfigError

ENDINGS = {"safetensors": (".safetensors",), "pt": (".pt", ".pth", ".bin"), "hf": ()}


def convert(
    source: str, destination: str, to: str, config: str | None = None, dtype: str | None = None,
    layout: str = "ours", force: bool = False, offline: bool = False,
) -> Summary:  # fmt: skip
    """Writes a checkpoint (file, folder or hub id) as "safetensors", "pt", or "hf" (a folder with config.json).

    With `config` the tensors must fit its `model` section and are written in our layout, without fixed positions;
    `layout="original"` writes the layout of the model's authors. Floating tensors become `dtype`, except those kept in
    float32. An existing destination needs `force`. Raises ConfigError or WeightsError without writing anything.
    """
    target, path = Path(destination), locate(source, offline=offline)
    _check_target(target, to, force)
    tensors, stated = read_state_dict(path), builder.config_json(path)
    changes: dict[str, Any] = {}
    if config:
        tensors, stated, changes = _fit(config, path, tensors, stated)
    tensors = to_original(tensors) if layout == "original" else tensors
    types = {name: _target_dtype(name, tensor, dtype) for name, tensor in tensors.items()}
    check_finite(path, {name: (tensor, types[name]) for name, tensor in tensors.items()})
    tensors = {name: tensor.to(types[name]) for name, tensor in tensors.items()}
    if to == "hf":
        _write_folder(tensors, target, stated)
    else:
        save_file(tensors, target)
    return summarize(target, tensors)._replace(**changes)


def _target_dtype(name: str, tensor: torch.Tensor, dtype: str | None) -> torch.dtype:
    """The dtype in which a tensor is written."""
    if dtype is None or not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if kept_in_float32(name) else DTYPES[dtype]


def _check_target(target: Path, to: str, force: bool) -> None:
    if target.suffix not in (ENDINGS[to] or [target.suffix]):
        raise ConfigError(f"{target}: --to {to} writes one file, whose name ends in {' or '.join(ENDINGS[to])}")
    if target.exists() and (not force or target.is_dir() != (to == "hf")):
        raise ConfigError(f"{target} exists; choose another path{'' if force else ', or replace it with --force'}")


def _fit(config: str, path: Path, tensors: TensorDict, stated: dict[str, Any]) -> tuple[dict, dict, dict]:
    """The tensors in the layout of a configuration's model, the new config.json, and the changes, as in Summary."""
    section = load_config(config)[0].get("model")
    if not isinstance(section, dict) or not isinstance(section.get("type"), str):
        raise ConfigError(f"{config}: has no model = dict(type=...) that the weights could fit")
    check_type("model", section["type"], {**registry.MODELS, **registry.AUTOENCODERS})
    defaults: dict[str, Any] = {"input_size": (16, 32, 32)}  # arbitrary: only positions depend on it
    if (text := tensors.get("y_embedder.y_embedding")) is not None and text.ndim == 2:
        defaults |= {"caption_channels": text.shape[1], "model_max_length": text.shape[0]}
    model = builder.build_model({k: v for k, v in section.items() if k != "strict"}, path, defaults)
    fitted, changes = fit(model, tensors, path, strict=section.get("strict", True))
    keywords = {key: value for key, value in model.config.items() if key != "input_size" or key in {*stated, *section}}
    stated = {**stated, "model_type": section["type"], **keywords}
    return {name: tensor for name, tensor in fitted.items() if name not in POSITIONS}, stated, changes


def _write_folder(tensors: TensorDict, target: Path, config: dict[str, Any]) -> None:
    """Writes a new folder atomically, or replaces weights and config.json in an existing one."""
    if target.exists():
        return save_pretrained(tensors, target, config)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_pretrained(tensors, unfinished, config)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
