"""Rules between a checkpoint and a model; each one's `load` leads from the file's tensors towards the model's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from opensora.errors import WeightsError

TensorDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Drop:
    """Tensors named like `pattern` (`*` for any text) are not loaded; where the model has them it keeps its own."""

    pattern: str

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.pattern)

    def load(self, tensors: TensorDict, model: TensorDict) -> TensorDict:
        return {name: tensor for name, tensor in tensors.items() if not self.matches(name)}


@dataclass(frozen=True)
class Rename:
    """Names like `pattern` become `replacement`; each `*` stands for the same text on both sides."""

    pattern: str
    replacement: str

    def __post_init__(self) -> None:
        if self.pattern.count("*") != self.replacement.count("*"):
            raise ValueError(f"Rename: '{self.pattern}' and '{self.replacement}' differ in their number of *")

    def load(self, tensors: TensorDict, model: TensorDict) -> TensorDict:
        regex = re.compile(re.escape(self.pattern).replace(r"\*", "(.*)"))
        template = self.replacement.replace("*", "{}")
        found = {name: regex.fullmatch(name) for name in tensors}
        renamed = {template.format(*match.groups()) if match else name: tensors[name] for name, match in found.items()}
        if len(renamed) < len(tensors):
            raise WeightsError(f"renaming '{self.pattern}' to '{self.replacement}' gives two tensors the same name")
        return renamed


@dataclass(frozen=True)
class ResizeRows:
    """Tensor `name` is cut to the model's number of rows, or extended by repeating its last row."""

    name: str

    def load(self, tensors: TensorDict, model: TensorDict) -> TensorDict:
        found, wanted = tensors.get(self.name), model.get(self.name)
        if found is None or wanted is None or found.shape == wanted.shape:
            return tensors
        if not (found.ndim == wanted.ndim > 0 and len(found) and found.shape[1:] == wanted.shape[1:]):
            return tensors  # no table of the same width: a misfit that is reported
        rows = torch.arange(len(wanted)).clamp(max=len(found) - 1)
        return {**tensors, self.name: found[rows]}


Rule = Drop | Rename | ResizeRows
DEFAULT_RULES: tuple[Rule, ...] = (Drop("pos_embed"), Drop("pos_embed_temporal"), ResizeRows("y_embedder.y_embedding"))
