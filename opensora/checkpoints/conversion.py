"""Converts checkpoints between file formats, number formats and layouts: published ones to ours, and back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opensora import registry
from opensora.acceleration.model_parts import kept_in_float32
from opensora.acceleration.packed_tensor import unpacked
from opensora.acceleration.precision import DTYPES
from opensora.acceleration.quantization import KINDS
from opensora.checkpoints import builder
from opensora.checkpoints.eight_bits import quantize_tensors, stored
from opensora.checkpoints.fit import check_finite, fit
from opensora.checkpoints.hub import SUFFIXES, locate
from opensora.checkpoints.key_mapping import POSITIONS, TensorDict, to_original
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.save import save_file, save_pretrained
from opensora.checkpoints.summary import Summary, summarize
from opensora.checkpoints.tokenizer import tokenizer_files
from opensora.config import load_config
from opensora.config.sections import check_type
from opensora.errors import ConfigError

ENDINGS = {"safetensors": (".safetensors",), "pt": (".pt", ".pth", ".bin"), "hf": ()}
ANY_SIZE: dict[str, Any] = {"input_size": (16, 32, 32)}  # only positions depend on it
EIGHT_BITS = tuple(KINDS)  # as one .safetensors file, or as a folder


def convert(
    source: str, destination: str, to: str, config: str | None = None, dtype: str | None = None,
    layout: str = "ours", force: bool = False, offline: bool = False,
) -> Summary:  # fmt: skip
    """Writes a checkpoint (file, folder or hub id) as "safetensors", "pt", or "hf" (a folder with config.json).

    "int8" and "fp8" write a .safetensors file or a folder with the linear layers in 8 bits, see `eight_bits`; the
    others unpack quantized weights, to `dtype` or float32.
    With `config` the tensors must fit its `model` section and are written in our layout, without fixed positions;
    `layout="original"` writes the layout of the model's authors. Floating tensors become `dtype`, except those kept in
    float32. An existing destination needs `force`. Raises ConfigError or WeightsError without writing anything.
    """
    target, path, container = Path(destination), locate(source, offline=offline), _container(destination, to)
    _check_target(target, to, container, force)
    tensors, stated = read_state_dict(path), builder.config_json(path)
    changes: dict[str, Any] = {}
    if config:
        tensors, stated, changes = _fit(config, path, tensors, stated)
    tensors = to_original(tensors) if layout == "original" else tensors
    types = {name: _target_dtype(name, tensor, dtype) for name, tensor in tensors.items()}
    check_finite(path, {name: (tensor, types[name]) for name, tensor in tensors.items()})
    tensors = {name: tensor.to(types[name]) for name, tensor in tensors.items()}
    tensors = quantize_tensors(tensors, to) if to in EIGHT_BITS else {n: unpacked(t) for n, t in tensors.items()}
    if container == "hf":
        _write_folder(stored(tensors), target, stated, _tokenizer_files(path) if to in EIGHT_BITS else [])
    else:
        save_file(stored(tensors), target)
    return summarize(target, tensors)._replace(**changes)


def _target_dtype(name: str, tensor: torch.Tensor, dtype: str | None) -> torch.dtype:
    """The dtype in which a tensor is written."""
    if dtype is None or not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if kept_in_float32(name) else DTYPES[dtype]


def _container(destination: str, to: str) -> str:
    """The key of ENDINGS that `to` writes."""
    if to not in EIGHT_BITS:
        return to
    return "safetensors" if destination.endswith(".safetensors") else "hf"


def _check_target(target: Path, to: str, container: str, force: bool) -> None:
    if to in EIGHT_BITS and target.suffix in SUFFIXES and container == "hf":
        raise ConfigError(f"{target}: --to {to} writes a .safetensors file, or a folder")
    if target.suffix not in (ENDINGS[container] or [target.suffix]):
        raise ConfigError(f"{target}: --to {to} writes one file, whose name ends in {' or '.join(ENDINGS[container])}")
    if target.exists() and (not force or target.is_dir() != (container == "hf")):
        raise ConfigError(f"{target} exists; choose another path{'' if force else ', or replace it with --force'}")


def model_section(config: str) -> dict[str, Any]:
    """The model section of a configuration. Raises ConfigError."""
    section = load_config(config)[0].get("model")
    if not isinstance(section, dict) or not isinstance(section.get("type"), str):
        raise ConfigError(f"{config}: has no model = dict(type=...) that the weights could fit")
    check_type("model", section["type"], {**registry.MODELS, **registry.AUTOENCODERS})
    return section


def _fit(config: str, path: Path, tensors: TensorDict, stated: dict[str, Any]) -> tuple[dict, dict, dict]:
    """The tensors in the layout of a configuration's model, the new config.json, and the changes, as in Summary."""
    section = model_section(config)
    defaults = dict(ANY_SIZE)
    if (text := tensors.get("y_embedder.y_embedding")) is not None and text.ndim == 2:
        defaults |= {"caption_channels": text.shape[1], "model_max_length": text.shape[0]}
    model = builder.build_model({k: v for k, v in section.items() if k != "strict"}, path, defaults)
    fitted, changes = fit(model, tensors, path, strict=section.get("strict", True))
    keywords = {key: value for key, value in model.config.items() if key != "input_size" or key in {*stated, *section}}
    stated = {**stated, "model_type": section["type"], **keywords}
    return {name: tensor for name, tensor in fitted.items() if name not in POSITIONS}, stated, changes


def _tokenizer_files(path: Path) -> list[Path]:
    """The files of the tokenizer beside a text encoder's weights, which goes along with them."""
    return tokenizer_files(path) if path.is_dir() else []


def _write_folder(tensors: TensorDict, target: Path, config: dict[str, Any], beside: Sequence[Path] = ()) -> None:
    """Writes a new folder atomically, or replaces weights, config.json and the files `beside` in an existing one."""
    if target.exists():
        _fill_folder(tensors, target, config, beside)
        return
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _fill_folder(tensors, unfinished, config, beside)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _fill_folder(tensors: TensorDict, folder: Path, config: dict[str, Any], beside: Sequence[Path]) -> None:
    save_pretrained(tensors, folder, config)
    for file in beside:
        shutil.copyfile(file, folder / file.name)
