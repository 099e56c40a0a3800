"""Adapter files: LoRA weights read and written in four layouts, which are told apart by their content."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from opensora.checkpoints import lora_config
from opensora.checkpoints.finite import not_finite
from opensora.checkpoints.formatting import join_first
from opensora.checkpoints.lora_layouts import ENDS, LAYOUTS, Pair, layout_of, module_names, read_pairs, write_pairs
from opensora.checkpoints.read import read_metadata, read_state_dict
from opensora.checkpoints.save import save_file
from opensora.checkpoints.summary import content_hash
from opensora.errors import WeightsError
from opensora.files import atomic_write, open_bounded
from opensora.models.lora import LoRALayer, LoRAWeights, check_weights, linear_layers

FILE, PEFT_FILE, PEFT_CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"
BASE = "opensora.base_sha256"  # of the metadata
# Metadata that a layout writes anew; all other metadata goes along.
OWN = {
    "format", BASE, lora_config.METADATA, "ss_network_module", "ss_network_dim", "ss_network_alpha", "sshs_model_hash",
}  # fmt: skip
MAX_BYTES = 2**34  # of a file


def adapter_file(path: Path) -> Path | None:
    """The adapter file that a path names: a file, or the one of a usual name in a folder."""
    files = (path / FILE, path / PEFT_FILE) if path.is_dir() else (path,)
    return next((file for file in files if file.is_file()), None)


def read_lora(path: str | Path, model: nn.Module) -> LoRAWeights:
    """The adapter in a file or folder, checked against the layers of `model`, which may be on the meta device.

    Raises WeightsError naming the file and the first problem.
    """
    weights = read_layers(path, linear_layers(model))
    try:
        check_weights(model, weights)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    return weights


def read_layers(path: str | Path, modules: Collection[str] | None = None) -> LoRAWeights:
    """The adapter in a file or folder, as it is. `modules` are the model's, which kohya's names need.

    Raises WeightsError.
    """
    file = adapter_file(Path(path))
    if file is None:
        raise WeightsError(f"{path}: no such adapter; give a .safetensors file, or a folder with {FILE} or {PEFT_FILE}")
    if file.suffix != ".safetensors":
        raise WeightsError(f"{file}: adapters are .safetensors files; save it as one")
    with open_bounded(file, MAX_BYTES, WeightsError):
        pass  # refuses devices and pipes
    metadata, tensors = read_metadata(file), read_state_dict(file)
    if bad := not_finite(tensors):
        raise WeightsError(f"{file}: has non-finite values in {join_first(list(bad), 3)}; use another file")
    name = layout_of(tensors, file)
    pairs = read_pairs(tensors, LAYOUTS[name], file)
    names = module_names(pairs, LAYOUTS[name], modules, file)
    config = _config(name, metadata, file)
    layers = {names[name]: _layer(names[name], pair, config, file) for name, pair in pairs.items()}
    return LoRAWeights(layers, metadata.get(BASE), metadata)


def _config(layout: str, metadata: Mapping[str, str], file: Path) -> lora_config.LoRAFileConfig | None:
    if layout == "peft":
        return lora_config.read_config(file.parent / PEFT_CONFIG)
    return lora_config.parse_metadata(metadata, file) if layout == "diffusers" else None


def _layer(module: str, pair: Pair, config: lora_config.LoRAFileConfig | None, file: Path) -> LoRALayer:
    rank, alpha = len(pair.a), pair.alpha
    if config and config.rank_of(module) != rank:
        stated = config.rank_of(module)
        raise WeightsError(f"{file}: {join_first([module])} has rank {rank}, its configuration says {stated}")
    if config and alpha is not None and alpha != config.alpha_of(module):
        other = f"{config.alpha_of(module):g}"
        raise WeightsError(f"{file}: {join_first([module])} has alpha {alpha:g}, its configuration says {other}")
    if alpha is None:
        alpha = float(rank) if config is None else config.alpha_of(module)
    return LoRALayer(pair.a, pair.b, alpha)


def check_base(path: str | Path, weights: LoRAWeights, sha256: str) -> None:
    """Raises WeightsError if an adapter names another base than the weights with this hash."""
    if weights.base is not None and weights.base != sha256:
        here, there = sha256[:12], weights.base[:12]
        problem = f"was trained on other weights ({there}) than those loaded ({here})"
        raise WeightsError(f"{path}: {problem}; use those, or say --any-base")


def write_lora(path: str | Path, weights: LoRAWeights, layout: str = "diffusers") -> None:
    """Writes an adapter in a layout of `LAYOUTS`, atomically: a .safetensors file, or a folder for "peft".

    Raises WeightsError.
    """
    path, tensors = Path(path), write_pairs(weights.layers, LAYOUTS[layout])
    metadata = {key: value for key, value in weights.metadata.items() if key not in OWN}
    metadata |= {} if weights.base is None else {BASE: weights.base}
    if layout == "peft":
        with atomic_write(path / PEFT_CONFIG, make_folders=True, error=WeightsError) as [temporary]:
            temporary.write_text(lora_config.as_file(weights.layers), encoding="utf-8")
            save_file(tensors, path / PEFT_FILE, metadata)
        return
    if layout == "diffusers":
        metadata[lora_config.METADATA] = lora_config.as_metadata(weights.layers)
    elif layout == "kohya":
        metadata |= _kohya_metadata(weights.layers, tensors)
    save_file(tensors, path, metadata)


def _kohya_metadata(layers: Mapping[str, LoRALayer], tensors: dict[str, Tensor]) -> dict[str, str]:
    """The most frequent rank and alpha, and the SHA-256 of all bytes after the header."""
    content = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    header = 8 + int.from_bytes(content[:8], "little")
    described: dict[str, Any] = lora_config.describe(layers)
    return {
        "ss_network_module": "networks.lora", "ss_network_dim": str(described["r"]),
        "ss_network_alpha": str(described["lora_alpha"]),
        "sshs_model_hash": hashlib.sha256(content[header:]).hexdigest(),
    }  # fmt: skip


def modelspec(architecture: str, title: str, date: str, license: str = "", base: str = "") -> dict[str, str]:
    """Metadata after Stability AI's model specification 1.0 for an adapter of a model type, such as "STDiT3".

    `date` is in ISO 8601.
    """
    stated = {
        "sai_model_spec": "1.0.0", "architecture": f"{architecture}/lora", "implementation": "opensora",
        "title": title, "date": date, "license": license, "merged_from": base,
    }  # fmt: skip
    return {f"modelspec.{key}": value for key, value in stated.items() if value}


def is_adapter(path: Path, keys: Collection[str]) -> bool:
    """Whether a file with these keys is an adapter in a layout of `LAYOUTS`."""
    file = adapter_file(path)
    prefixes = tuple(layout.prefix for layout in LAYOUTS.values())
    return (
        file is not None
        and file.suffix == ".safetensors"
        and all(key.startswith(prefixes) and key.endswith(tuple(ENDS)) for key in keys)
    )


def describe_adapter(path: Path) -> str:
    """The lines that `opensora inspect` prints of an adapter. Raises WeightsError."""
    file = adapter_file(path)
    assert file is not None, path
    tensors, metadata = read_state_dict(file), read_metadata(file)
    layout = layout_of(tensors, file)
    pairs = read_pairs(tensors, LAYOUTS[layout], file)
    config = _config(layout, metadata, file)
    layers = {name: _layer(name, pair, config, file) for name, pair in pairs.items()}
    ranks = Counter(layer.rank for layer in layers.values())
    alphas = Counter(layer.alpha for layer in layers.values())
    values = sum(layer.A.numel() + layer.B.numel() for layer in layers.values())
    lines = [
        f"{file}: LoRA of {len(layers):,} layers, {values:,} parameters, in the layout of {layout}",
        f"rank {join_first([str(one) for one in ranks])}, alpha {join_first([f'{one:g}' for one in alphas])}",
        f"base: {metadata.get(BASE, 'not stated')}",
    ]
    stated = {key: value for key, value in metadata.items() if key.startswith("modelspec.")}
    return "\n".join([*lines, *(f"{key}: {join_first([value])}" for key, value in sorted(stated.items()))])


def adapter_hash(weights: LoRAWeights) -> str:
    """SHA-256 of the tensors and alphas of an adapter, whatever the layout of its file."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b, alpha) in weights.layers.items():
        tensors |= {f"{name}.A": a, f"{name}.B": b, f"{name}.alpha": torch.tensor(alpha, dtype=torch.float64)}
    return content_hash(tensors)
