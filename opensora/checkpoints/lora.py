"""Adapter files: LoRA weights in the layout of diffusers.

Keys are `transformer.MODULE.lora_A.weight` and `.lora_B.weight`; the metadata has ranks and alphas as JSON, and the
hash of the base that the adapter belongs to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from opensora.checkpoints.finite import not_finite
from opensora.checkpoints.formatting import join_first
from opensora.checkpoints.read import read_metadata, read_state_dict
from opensora.checkpoints.save import save_file
from opensora.checkpoints.summary import content_hash
from opensora.config.schema import Name, Number, Positive, Schema, check
from opensora.errors import WeightsError
from opensora.files import open_bounded, parse_json
from opensora.models.lora import LoRALayer, LoRAWeights, check_weights

FILE = "pytorch_lora_weights.safetensors"
PREFIX, A, B = "transformer.", ".lora_A.weight", ".lora_B.weight"
CONFIG, BASE = "lora_adapter_metadata", "opensora.base_sha256"  # of the metadata
MAX_BYTES = 2**34  # of a file
MAX_LAYERS = 100_000
Rank = Annotated[Positive, Field(le=65_536)]


class _Config(Schema):
    """The configuration in the metadata, without its prefix; other keys of peft's are not read."""

    r: Rank
    lora_alpha: Number
    rank_pattern: dict[Name, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[Name, Number] = Field(default_factory=dict)


def adapter_file(path: Path) -> Path | None:
    """The adapter file that a path names: a .safetensors file, or a folder with one of the usual name."""
    file = path / FILE if path.is_dir() else path
    return file if file.is_file() else None


def read_lora(path: str | Path, model: nn.Module) -> LoRAWeights:
    """The adapter in a file or folder, checked against the layers of `model`, which may be on the meta device.

    Raises WeightsError naming the file and the first problem.
    """
    weights = read_layers(path)
    try:
        check_weights(model, weights)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    return weights


def read_layers(path: str | Path) -> LoRAWeights:
    """The adapter in a file or folder, as it is. Raises WeightsError."""
    file = adapter_file(Path(path))
    if file is None:
        raise WeightsError(f"{path}: no such adapter; give a .safetensors file, or a folder with {FILE}")
    with open_bounded(file, MAX_BYTES, WeightsError):
        pass  # refuses devices and pipes
    if file.suffix != ".safetensors":
        raise WeightsError(f"{file}: adapters are .safetensors files")
    metadata, tensors = read_metadata(file), read_state_dict(file)
    if bad := not_finite(tensors):
        raise WeightsError(f"{file}: has non-finite values in {join_first(list(bad), 3)}; use another file")
    config, base = _config(file, metadata), metadata.get(BASE)
    found = _pairs(file, tensors)
    layers = {name: LoRALayer(a, b, _alpha(name, len(a), config)) for name, (a, b) in found.items()}
    return LoRAWeights(layers, base, metadata)


def _pairs(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> A and B. Raises WeightsError for an unknown key or half a pair."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        half = next((end for end in (A, B) if name.endswith(end)), None)
        if half is None or not key.startswith(PREFIX) or tensor.ndim != 2 or not tensor.is_floating_point():
            raise WeightsError(f"{file}: {join_first([key])} is no tensor of an adapter of this layout")
        halves.setdefault(name.removesuffix(half), {})[half] = tensor
    if len(halves) > MAX_LAYERS:
        raise WeightsError(f"{file}: adapts {len(halves):,} layers, over {MAX_LAYERS:,}")
    for name, pair in halves.items():
        if len(pair) < 2:
            raise WeightsError(f"{file}: {join_first([name])} has only {next(iter(pair))[1:]}; copy the file again")
    return {name: (pair[A], pair[B]) for name, pair in halves.items()}


def _config(file: Path, metadata: Mapping[str, str]) -> _Config | None:
    if CONFIG not in metadata:
        return None
    found: Any = parse_json(metadata[CONFIG], str(file), WeightsError)
    found = found if isinstance(found, dict) else {}
    known = {name: found[PREFIX + name] for name in _Config.model_fields if found.get(PREFIX + name) is not None}
    return check(_Config, known, f"{file}: {CONFIG}", WeightsError, "save the adapter again")


def _alpha(name: str, rank: int, config: _Config | None) -> float:
    """The alpha of a module; without a configuration its rank."""
    return float(rank) if config is None else float(config.alpha_pattern.get(name, config.lora_alpha))


def write_lora(path: str | Path, weights: LoRAWeights, layout: str = "diffusers") -> None:
    """Writes an adapter to a .safetensors file, atomically. Raises WeightsError."""
    assert layout == "diffusers"
    tensors: dict[str, Tensor] = {}
    for name, layer in weights.layers.items():
        tensors |= {PREFIX + name + A: layer.A, PREFIX + name + B: layer.B}
    save_file(tensors, path, {CONFIG: json.dumps(_described(weights)), **_base(weights)})


def _base(weights: LoRAWeights) -> dict[str, str]:
    return {} if weights.base is None else {BASE: weights.base}


def _described(weights: LoRAWeights) -> dict[str, Any]:
    """The configuration of an adapter as diffusers stores it; r and lora_alpha are the most frequent ones."""
    ranks = {name: layer.rank for name, layer in weights.layers.items()}
    alphas = {name: _number(layer.alpha) for name, layer in weights.layers.items()}
    rank, alpha = (max(set(found.values()), key=list(found.values()).count) for found in (ranks, alphas))
    config = {
        "r": rank, "lora_alpha": alpha, "target_modules": sorted(weights.layers),
        "rank_pattern": {name: one for name, one in ranks.items() if one != rank},
        "alpha_pattern": {name: one for name, one in alphas.items() if one != alpha},
    }  # fmt: skip
    return {PREFIX + name: value for name, value in config.items()}


def _number(value: float) -> float:
    return int(value) if math.isfinite(value) and value == int(value) else value


def adapter_hash(weights: LoRAWeights) -> str:
    """SHA-256 of the tensors and alphas of an adapter, whatever the layout of its file."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b, alpha) in weights.layers.items():
        tensors |= {f"{name}.A": a, f"{name}.B": b, f"{name}.alpha": torch.tensor(alpha, dtype=torch.float64)}
    return content_hash(tensors)
