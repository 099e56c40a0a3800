"""Rules between the tensors of a checkpoint and those of a model: what to drop, rename or resize."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from opensora.errors import WeightsError

TensorDict = Mapping[str, Tensor]


class Rule:
    """One difference between a checkpoint and a model; `load` leads to the model's tensors, `save` leads back."""

    def load(self, tensors: TensorDict, model: TensorDict) -> TensorDict:
        return tensors

    def save(self, tensors: TensorDict) -> TensorDict:
        return tensors


@dataclass(frozen=True)
class Drop(Rule):
    """Tensors named like `pattern` (`*` for any text) are not loaded; where the model has them it keeps its own."""

    pattern: str

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.pattern)

    def load(self, tensors: TensorDict, model: TensorDict) -> TensorDict:
        return {name: tensor for name, tensor in tensors.items() if not self.matches(name)}


@dataclass(frozen=True)
class Rename(Rule):
    """Names like `pattern` become `replacement`; each `*` stands for the same text on both sides."""

    pattern: str
    replacement: str

    def __post_init__(self) -> None:
        if self.pattern.count("*") != self.replacement.count("*"):
            raise ValueError(f"Rename: '{self.pattern}' and '{self.replacement}' differ in their number of *")

    def load(self, tensors: TensorDict, model: TensorDict) -> TensorDict:
        return _renamed(tensors, self.pattern, self.replacement)

    def save(self, tensors: TensorDict) -> TensorDict:
        return _renamed(tensors, self.replacement, self.pattern)


@dataclass(frozen=True)
class ResizeRows(Rule):
    """Tensor `name` is cut to the model's number of rows, or extended by repeating its last row."""

    name: str

    def load(self, tensors: TensorDict, model: TensorDict) -> TensorDict:
        found, wanted = tensors.get(self.name), model.get(self.name)
        if found is None or wanted is None or found.ndim == 0 or found.shape[1:] != wanted.shape[1:]:
            return tensors
        rows = wanted.shape[0]
        if found.shape[0] in (0, rows):
            return tensors
        filler = found[-1:].expand(max(rows - found.shape[0], 0), *found.shape[1:])
        return {**tensors, self.name: torch.cat([found[:rows], filler])}


DEFAULT_RULES: tuple[Rule, ...] = (
    Drop("pos_embed"),
    Drop("pos_embed_temporal"),
    ResizeRows("y_embedder.y_embedding"),
)


def export_names(tensors: TensorDict, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """The model's tensors under the names of the checkpoint that `rules` load: the rules, undone from last to first."""
    for rule in reversed(rules):
        tensors = rule.save(tensors)
    return dict(tensors)


def _renamed(tensors: TensorDict, pattern: str, replacement: str) -> dict[str, Tensor]:
    regex = re.compile(re.escape(pattern).replace(r"\*", "(.*)"))
    pieces = replacement.split("*")

    def new(name: str) -> str:
        match = regex.fullmatch(name)
        return (
            "".join(part for pair in zip(pieces, (*match.groups(), ""), strict=True) for part in pair)
            if match
            else name
        )

    result = {new(name): tensor for name, tensor in tensors.items()}
    if len(result) < len(tensors):
        raise WeightsError(f"renaming '{pattern}' to '{replacement}' gives two tensors the same name")
    return result
