"""Discovery of the parity cases: every JSON file of a folder, with the tensors that lie beside it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SHIPPED = Path(__file__).parent / "data"
ROOT = Path(os.environ.get("OPENSORA_PARITY_DIR", SHIPPED))


@dataclass(frozen=True)
class Case:
    """One recorded case; `facts` is its JSON, `tensors()` reads the file beside it."""

    path: Path

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path.with_suffix(".safetensors"))

    def __str__(self) -> str:
        return self.path.relative_to(ROOT).with_suffix("").as_posix()


def discover(folder: str, pattern: str = "*.json") -> list[Case]:
    """All cases of `ROOT/folder` (pattern relative to it); finding none is an error, not an empty test."""
    found = sorted((ROOT / folder).glob(pattern))
    if not found:
        raise FileNotFoundError(f"no parity case matches {ROOT / folder / pattern}")
    return [Case(path) for path in found]


def needed(found: list[Any], what: str) -> Any:
    """The first of the cases that a test needs, or of their rows; another set than the shipped one may have none."""
    if not found and ROOT != SHIPPED:
        pytest.skip(f"this set of cases has no {what}")
    return found[0]


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under `prefix`, with the prefix removed."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
