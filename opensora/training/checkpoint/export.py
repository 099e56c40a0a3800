"""Exports a model for inference from a training run."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from opensora.acceleration.model_parts import kept_in_float32
from opensora.checkpoints.hub import INDEX, SUFFIXES, read_config_json
from opensora.checkpoints.lora import FILE as ADAPTER
from opensora.checkpoints.lora import read_layers, write_lora
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.save import save_pretrained
from opensora.checkpoints.summary import Summary, summarize
from opensora.errors import WeightsError
from opensora.models.lora import LoRALayer, LoRAWeights
from opensora.training.adapter import A, B
from opensora.training.checkpoint.folders import find_checkpoint


def export(source: Path, destination: Path, ema: bool = True, dtype: torch.dtype | None = None) -> Summary:
    """Writes config.json and model.safetensors into `destination` and returns what was written.

    `source` is an experiment folder, one of its checkpoints (`ema` takes the averaged weights) or a model folder, whose
    tokenizer comes along. Of an adapter, its file is written. Floating tensors become `dtype` (None: as they are), save
    those that need float32. Raises WeightsError when `source` holds no weights or is `destination`.
    """
    if source.exists() and destination.exists() and source.samefile(destination):
        raise WeightsError(f"{destination} is the model to export; name another folder")
    if adapter := adapter_source(source):
        return _export_adapter(*adapter, destination, ema, dtype)
    finished = (source / "config.json").is_file()
    if finished and not ema:
        raise WeightsError(f"{source} is an exported model, which has one set of weights; remove --no-ema")
    model = source if finished else find_checkpoint(source) / "model"
    tensors = model.parent / "ema.pt" if ema and not finished else model
    state = {}
    for name, tensor in read_state_dict(tensors).items():
        kept = torch.float32 if kept_in_float32(name) else dtype or tensor.dtype
        state[name] = tensor.to(kept) if tensor.is_floating_point() else tensor
    save_pretrained(state, destination, read_config_json(model))
    for file in model.iterdir():
        if file.is_file() and file.name != "config.json" and not file.name.endswith((*SUFFIXES, INDEX)):
            shutil.copyfile(file, destination / file.name)
    return summarize(destination, state)


def adapter_source(source: Path) -> tuple[Path, Path | None] | None:
    """The adapter file that `source` names and, of a training checkpoint, its averaged weights; None for a model."""
    if (source / ADAPTER).is_file():
        return source / ADAPTER, None
    if (source / "config.json").is_file() or not source.is_dir():
        return None
    checkpoint = find_checkpoint(source)
    file = checkpoint / "model" / ADAPTER
    return (file, checkpoint / "ema.pt") if file.is_file() else None


def _export_adapter(
    file: Path, averaged: Path | None, destination: Path, ema: bool, dtype: torch.dtype | None
) -> Summary:
    weights = read_layers(file)
    state = read_state_dict(averaged) if averaged and ema else {}

    def converted(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype or tensor.dtype)

    layers = {
        name: LoRALayer(converted(state.get(name + A, one.A)), converted(state.get(name + B, one.B)), one.alpha)
        for name, one in weights.layers.items()
    }
    write_lora(destination / ADAPTER, LoRAWeights(layers, weights.base))
    return summarize(destination / ADAPTER, read_state_dict(destination / ADAPTER))
