"""The adapters of a loaded diffusion model: read, checked, and put in place for each request."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from opensora.checkpoints.lora import adapter_file, adapter_hash, check_base, read_lora
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError, WeightsError
from opensora.models import lora
from opensora.models.lora import LoRAWeights
from opensora.pipeline.adapter_uses import AdapterUse, adapter_uses


class _Identity(NamedTuple):
    """What changes when a file is replaced."""

    path: str
    inode: int
    size: int
    modified: int


class Adapters:
    """The adapters in one diffusion model. Putting others in place does not touch the weights of the model."""

    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}  # "lora 1" -> SHA-256, of the adapters in place
        self._in_place: tuple[Any, ...] | None = None
        self._model: nn.Module | None = None

    def use(self, model: nn.Module, settings: InferenceSettings, base: str, dtype: torch.dtype) -> bool:
        """Puts the adapters of the settings in place of others; returns whether that changed the model.

        base: SHA-256 of the weights of the model. Raises WeightsError and ConfigError.
        """
        uses = adapter_uses(settings.lora)
        wanted = (uses, [_identity(one.path) for one in uses], settings.fuse_lora, settings.any_base)
        if model is self._model and wanted == self._in_place:
            return False
        if model is not self._model and not uses:
            self._model, self._in_place, self.hashes = model, wanted, {}
            return False
        found = [read_checked(one.path, model, base, settings.any_base) for one in uses]
        self._model = self._in_place = None  # until all are in place
        _remove_all(model)
        for number, weights in enumerate(found):
            lora.add_adapter(model, str(number), weights, dtype)
        lora.set_adapters(model, {str(number): one.strength for number, one in enumerate(uses)})
        if settings.fuse_lora:
            _fuse(model)
        self.hashes = {f"lora {number}": adapter_hash(one) for number, one in enumerate(found, start=1)}
        self._model, self._in_place = model, wanted
        return True


def read_checked(path: str, model: nn.Module, base: str | None, any_base: bool) -> LoRAWeights:
    """The adapter in a file, which fits `model`. Raises WeightsError for one of another base unless `any_base`."""
    weights = read_lora(path, model)
    if base is not None and not any_base:
        check_base(path, weights, base)
    return weights


def check_adapters(model: nn.Module, uses: Sequence[AdapterUse]) -> None:
    """Raises WeightsError for an adapter that does not fit a model, which may be on the meta device."""
    for use in uses:
        read_lora(use.path, model)


def _identity(path: str) -> _Identity:
    file = adapter_file(Path(path))
    if file is None:
        raise WeightsError(f"{path}: no such adapter; give a .safetensors file or a folder")
    found = os.stat(file)
    return _Identity(str(file), found.st_ino, found.st_size, found.st_mtime_ns)


def _remove_all(model: nn.Module) -> None:
    lora.unfuse(model)
    for name in lora.adapters_of(model):
        lora.remove_adapter(model, name)


def _fuse(model: nn.Module) -> None:
    try:
        lora.fuse(model)
    except ValueError as error:
        raise ConfigError(f"fuse_lora: {error}") from error
