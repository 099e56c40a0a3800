"""The configuration of an adapter as peft writes it: a JSON file, or the metadata of a file of diffusers."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from opensora.config.schema import Name, Number, Positive, Schema, check
from opensora.errors import WeightsError
from opensora.files import parse_json, read_json
from opensora.models.lora import LoRALayer

METADATA = "lora_adapter_metadata"  # key of diffusers' metadata
PREFIX = "transformer."  # of the keys inside
Rank = Annotated[Positive, Field(le=65_536)]


class LoRAFileConfig(Schema):
    """The keys that say what the tensors mean; those that change nothing are not read."""

    model_config = ConfigDict(extra="ignore")

    peft_type: str = "LORA"
    r: Rank
    lora_alpha: Number
    rank_pattern: dict[Name, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[Name, Number] = Field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    bias: str = "none"

    def alpha_of(self, module: str) -> float:
        """The alpha of a module; with rank-stabilised scaling, alpha / sqrt(rank), the one with the same effect."""
        alpha = _lookup(self.alpha_pattern, module, self.lora_alpha)
        return float(alpha) * math.sqrt(self.rank_of(module)) if self.use_rslora else float(alpha)

    def rank_of(self, module: str) -> int:
        """The rank of a module."""
        return int(_lookup(self.rank_pattern, module, self.r))


def _lookup(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The value of the longest name that is the module's, or its end after a dot."""
    parts = module.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    return next((pattern[end] for end in ends if end in pattern), default)


def parse_metadata(metadata: Mapping[str, str], file: Path) -> LoRAFileConfig | None:
    """The configuration in the metadata of diffusers; None if there is none. Raises WeightsError."""
    if METADATA not in metadata:
        return None
    found: Any = parse_json(metadata[METADATA], str(file), WeightsError)
    stated = {key.removeprefix(PREFIX): value for key, value in found.items()} if isinstance(found, dict) else found
    return _checked(stated, f"{file}: {METADATA}")


def read_config(file: Path) -> LoRAFileConfig:
    """The configuration in an adapter_config.json. Raises WeightsError."""
    return _checked(read_json(file, WeightsError), str(file))


def _checked(stated: Any, where: str) -> LoRAFileConfig:
    stated = {key: value for key, value in stated.items() if value is not None} if isinstance(stated, dict) else stated
    config: LoRAFileConfig = check(LoRAFileConfig, stated, where, WeightsError, "save the adapter again")
    kinds = {
        f"of type {config.peft_type[:20]}": config.peft_type != "LORA", "with DoRA": config.use_dora,
        "with biases": config.lora_bias or config.bias != "none", "with fan_in_fan_out": config.fan_in_fan_out,
    }  # fmt: skip
    if kind := next((kind for kind, found in kinds.items() if found), None):
        raise WeightsError(f"{where}: an adapter {kind} is not read here; merge it with the program that made it")
    for name in (*config.rank_pattern, *config.alpha_pattern):
        if not re.fullmatch(r"[\w.]+", name):  # peft takes regular expressions
            raise WeightsError(f"{where}: the pattern {name[:80]!r} is no name of a module; save the adapter again")
    return config


def describe(layers: Mapping[str, LoRALayer]) -> dict[str, Any]:
    """The configuration of an adapter; r and lora_alpha are the most frequent ones."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: _plain(layer.alpha) for name, layer in layers.items()}
    [(rank, _)], [(alpha, _)] = Counter(ranks.values()).most_common(1), Counter(alphas.values()).most_common(1)
    return {
        "r": rank, "lora_alpha": alpha, "target_modules": sorted(layers),
        "rank_pattern": {name: one for name, one in ranks.items() if one != rank},
        "alpha_pattern": {name: one for name, one in alphas.items() if one != alpha},
    }  # fmt: skip


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value


def as_metadata(layers: Mapping[str, LoRALayer]) -> str:
    """The configuration as diffusers stores it."""
    return json.dumps({PREFIX + key: value for key, value in describe(layers).items()})


def as_file(layers: Mapping[str, LoRALayer]) -> str:
    """The text of an adapter_config.json."""
    fixed = {
        "peft_type": "LORA", "base_model_name_or_path": None, "bias": "none", "inference_mode": True,
        "lora_dropout": 0.0, "task_type": None,
    }  # fmt: skip
    return json.dumps({**fixed, **describe(layers)}, indent=2) + "\n"
