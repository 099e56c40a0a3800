"""The methods of a pipeline that load, weight and remove adapters, also by the names of diffusers."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError, did_you_mean
from opensora.pipeline.adapter_uses import AdapterUse, adapter_uses
from opensora.pipeline.adapters import read_checked
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.request import make_size

Names = str | Sequence[str]
Strengths = float | Sequence[float]


class NamedAdapters:
    """Adapters by name, as defaults of every call: they are the pipeline's settings `lora` and `fuse_lora`.

    The models are not loaded again, and compiled code stays.
    """

    settings: InferenceSettings
    models: LoadedModels

    def __init__(self) -> None:
        self.adapters: dict[str, str] = {}  # name -> file

    def load_lora(self, path: str | os.PathLike[str], name: str | None = None, strength: float = 1.0) -> str:
        """Adds the adapter in a file or folder, active beside the others; returns its name, by default the file's.

        Raises WeightsError for a file that is not an adapter of this model, ConfigError for a name that is taken.
        """
        path = os.fspath(path)
        name = name or re.sub(r"[^A-Za-z0-9_-]", "_", Path(path).stem) or "adapter"
        if name in self.adapters:
            raise ConfigError(f"there is an adapter {name!r} already; give another name, or unload it first")
        model, summary = self.models.model, self.models.summaries.get("model")
        if model is None:
            model = self.models.build(make_size(self.settings)).model
        read_checked(path, model, summary and summary.sha256, self.settings.any_base)
        self.adapters[name] = path
        self._use([*self.active_adapters(), (name, strength)])
        return name

    def active_adapters(self) -> list[tuple[str, float]]:
        """Name and strength of each active adapter."""
        by_path = {path: name for name, path in self.adapters.items()}
        return [(by_path.get(one.path, one.path), one.strength) for one in adapter_uses(self.settings.lora)]

    def set_adapters(self, names: Names, strengths: Strengths = 1.0) -> None:
        """Makes exactly these adapters active, each with its strength. Raises ConfigError for an unknown name."""
        names = [names] if isinstance(names, str) else list(names)
        values = [float(strengths)] * len(names) if isinstance(strengths, int | float) else list(strengths)
        if len(values) != len(names):
            raise ConfigError(f"{len(names)} adapters have {len(values)} strengths; give one for each")
        self._use(list(zip(names, values, strict=True)))

    def fuse(self) -> None:
        """Adds the active adapters to the weights from the next call on: no computation of their own, more memory."""
        self.settings = dataclasses.replace(self.settings, fuse_lora=True)

    def unfuse(self) -> None:
        """Undoes `fuse`, bit for bit."""
        self.settings = dataclasses.replace(self.settings, fuse_lora=False)

    def unload(self, name: str | None = None) -> None:
        """Removes an adapter, or all of them: the model is then what it was."""
        if name is not None:
            self._require(name)
        gone = [name] if name is not None else list(self.adapters)
        kept = [one for one in self.active_adapters() if one[0] not in gone] if name is not None else []
        self._use(kept)
        for one in gone:
            del self.adapters[one]

    # The names of diffusers

    def load_lora_weights(self, path: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """The same as `load_lora`."""
        self.load_lora(path, adapter_name)

    def fuse_lora(self) -> None:
        """The same as `fuse`."""
        self.fuse()

    def unfuse_lora(self) -> None:
        """The same as `unfuse`."""
        self.unfuse()

    def unload_lora_weights(self) -> None:
        """The same as `unload`."""
        self.unload()

    def _use(self, active: Sequence[tuple[str, float]]) -> None:
        known = {path: path for path in (one.path for one in adapter_uses(self.settings.lora))} | self.adapters
        for name, _ in active:
            if name not in known:
                self._require(name)
        entries = [str(AdapterUse(known[name], float(strength))) for name, strength in active]
        adapter_uses(entries)  # raises for a strength out of bounds
        self.settings = dataclasses.replace(self.settings, lora=entries or None)

    def _require(self, name: str) -> None:
        if name not in self.adapters:
            raise ConfigError(f"there is no adapter {name[:80]!r}{did_you_mean(name, self.adapters)}")
