"""The setting `lora`: which adapter files a request uses, and how strongly. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from opensora.errors import ConfigError, WeightsError

MAX_ADAPTERS = 32  # of a request
MAX_STRENGTH = 100.0


class AdapterUse(NamedTuple):
    """An adapter file or folder, and the strength of the adapter."""

    path: str
    strength: float = 1.0

    def __str__(self) -> str:
        """As the setting has it; the strength is always stated, since a path may end like one."""
        return f"{self.path}:{self.strength!r}"


def adapter_uses(entries: Sequence[str] | None) -> list[AdapterUse]:
    """The adapters of the setting `lora`, each FILE or FILE:STRENGTH. Raises ConfigError."""
    if len(entries or ()) > MAX_ADAPTERS:
        raise ConfigError(f"lora names {len(entries or ())} adapters; at most {MAX_ADAPTERS} are used together")
    return [_parse(entry) for entry in entries or ()]


def _parse(entry: str) -> AdapterUse:
    path, colon, text = entry.rpartition(":")
    try:
        use = AdapterUse(path, float(text)) if colon and path else AdapterUse(entry)
    except ValueError:
        use = AdapterUse(entry)  # the colon belongs to the path
    if not math.isfinite(use.strength) or abs(use.strength) > MAX_STRENGTH:
        raise ConfigError(f"lora: the strength of {use.path[:200]} is {text}; it must be within +-{MAX_STRENGTH:g}")
    return use


def check_adapters_exist(entries: Sequence[str] | None) -> None:
    """Raises WeightsError where an adapter file does not exist, ConfigError for a wrong setting."""
    for use in adapter_uses(entries):
        if not Path(use.path).exists():
            raise WeightsError(f"{use.path}: no such adapter; give a .safetensors file or a folder, FILE[:STRENGTH]")
