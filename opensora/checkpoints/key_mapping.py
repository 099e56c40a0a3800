"""Rules from published files to models (`load`) and back (`save`), chosen by names and shapes, not by file names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from opensora.models.vae.vae import FRAMES_RENAMED

TensorDict = Mapping[str, Tensor]
Entry = tuple[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """What happens to tensors named like `pattern` (`*` for any text); this one changes nothing."""

    pattern: str

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.pattern)

    def applies(self, file: TensorDict, model: TensorDict) -> bool:
        """Whether the rule has a meaning between this file and this model."""
        return True

    def load(self, name: str, tensor: Tensor, model: TensorDict) -> Entry | None:
        """What takes the place of a tensor of the file; None when nothing does."""
        return name, tensor

    def save(self, name: str, tensor: Tensor) -> Entry | None:
        """The way back."""
        return name, tensor


class Drop(Rule):
    """Not loaded; where the model has tensors of these names it keeps its own."""

    def load(self, name: str, tensor: Tensor, model: TensorDict | None = None) -> Entry | None:
        return None if self.matches(name) else (name, tensor)

    save = load


@dataclass(frozen=True)
class Rename(Rule):
    """Names become `replacement`, `*` by `*`, if the model has names of that kind alone, and the file none of it."""

    replacement: str

    def __post_init__(self) -> None:
        if self.pattern.count("*") != self.replacement.count("*"):
            raise ValueError(f"Rename: '{self.pattern}' and '{self.replacement}' differ in their number of *")

    def applies(self, file: TensorDict, model: TensorDict) -> bool:
        ours = Rule(self.replacement)
        return not any(map(ours.matches, file)) and any(map(ours.matches, model)) and not any(map(self.matches, model))

    def load(self, name: str, tensor: Tensor, model: TensorDict) -> Entry:
        return _renamed(name, self.pattern, self.replacement), tensor

    def save(self, name: str, tensor: Tensor) -> Entry:
        return _renamed(name, self.replacement, self.pattern), tensor


@dataclass(frozen=True)
class Squeeze(Rule):
    """A tensor of `ndim` axes, those at `axes` of size 1: the model's, of which the file lacks them, or the reverse."""

    ndim: int
    axes: tuple[int, ...]

    def load(self, name: str, tensor: Tensor, model: TensorDict) -> Entry:
        mine = model.get(name) if self.matches(name) else None
        if mine is not None and (self._short(mine) == tensor.shape or self._short(tensor) == mine.shape):
            tensor = tensor.reshape(mine.shape)
        return name, tensor

    def save(self, name: str, tensor: Tensor) -> Entry:
        short = self._short(tensor) if self.matches(name) else None
        return name, tensor if short is None else tensor.reshape(short)

    def _short(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The shape without the axes; None unless they are there."""
        there = tensor.ndim == self.ndim and all(tensor.shape[axis] == 1 for axis in self.axes)
        return tuple(size for axis, size in enumerate(tensor.shape) if axis not in self.axes) if there else None


class ResizeRows(Rule):
    """A table is cut to the model's number of rows, or extended by repeating its last row. Nothing leads back."""

    def load(self, name: str, tensor: Tensor, model: TensorDict) -> Entry:
        mine = model.get(name) if self.matches(name) else None
        tables = mine is not None and tensor.ndim == mine.ndim > 0 and tensor.shape[1:] == mine.shape[1:]
        if tables and len(tensor) not in (0, len(mine)):
            tensor = tensor[torch.arange(len(mine)).clamp(max=len(tensor) - 1)]
        return name, tensor


def _renamed(name: str, pattern: str, replacement: str) -> str:
    match = re.fullmatch(re.escape(pattern).replace(r"\*", "(.*)"), name)
    return replacement.replace("*", "{}").format(*match.groups()) if match else name


POSITIONS = ("pos_embed", "pos_embed_temporal", "pos_embed_spatial", "temp_embed")
_DROPPED = tuple(map(Drop, POSITIONS))
_OLD_FRAMES = tuple(Rename(*names) for names in FRAMES_RENAMED if ".attentions." in names[0])
# Image models have patches without time and one kind of blocks; the oldest autoencoders no linear layers.
_UNDONE = (
    Squeeze("x_embedder.proj.weight", 5, (2,)),
    Rename("blocks.*", "spatial_blocks.*"),
    *(Rename(*names) for names in FRAMES_RENAMED if ".attentions." not in names[0]),
)
_LINEAR = tuple(Squeeze(f"*.attentions.*.{name}.weight", 4, (2, 3)) for name in ("to_q", "to_k", "to_v", "to_out.0"))
DEFAULT_RULES = (*_DROPPED, *_OLD_FRAMES, *_UNDONE, *_LINEAR, ResizeRows("y_embedder.y_embedding"))
OUR_OWN = (Rule("blocks.*.attn_temp.*"), Rule("temporal_blocks.*"))  # of models published in our layout


def to_original(tensors: TensorDict) -> dict[str, Tensor]:
    """Tensors of our layout in the one their model's authors publish, without positions."""
    rules = _DROPPED if any(rule.matches(name) for rule in OUR_OWN for name in tensors) else (*_DROPPED, *_UNDONE)
    entries: Iterable[Entry | None] = tensors.items()
    for rule in rules:
        entries = [rule.save(*entry) for entry in entries if entry]
    return dict(entry for entry in entries if entry)
