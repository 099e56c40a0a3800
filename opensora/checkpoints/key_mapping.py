"""Key mappings between published checkpoints and models: one list of rules per model class, see `KEY_MAPPINGS`.

A rule maps tensors of a checkpoint to the model (`load`) and back to the authors' layout (`save`). A rule that does not
concern a checkpoint changes nothing, so that every mapping also loads checkpoints in our own layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from opensora.models.text_encoder.clip import CLIP_DROPPED, CLIP_RENAMED
from opensora.models.text_encoder.t5 import T5_DROPPED, T5_RENAMED
from opensora.models.vae.vae import FRAMES_RENAMED

TensorDict = Mapping[str, Tensor]
Entry = tuple[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """Base class: a rule for tensors whose names match `pattern` (`*` matches any text). Changes nothing."""

    pattern: str

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.pattern)

    def applies(self, file: TensorDict, model: TensorDict) -> bool:
        """Whether the rule is needed between this file and this model."""
        return True

    def load(self, name: str, tensor: Tensor, model: TensorDict) -> Entry | None:
        """Maps a tensor of the file to the model; None drops it."""
        return name, tensor

    def save(self, name: str, tensor: Tensor) -> Entry | None:
        """Maps a tensor of the model to the authors' layout; None drops it."""
        return name, tensor


class Drop(Rule):
    """Drops matching tensors; the model keeps its own."""

    def load(self, name: str, tensor: Tensor, model: TensorDict | None = None) -> Entry | None:
        return None if self.matches(name) else (name, tensor)

    save = load


@dataclass(frozen=True)
class Rename(Rule):
    """Renames `pattern` to `replacement`, if the model has names like `replacement` and the file has not."""

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
    """Adds or removes `axes` of size 1 that only the file or only the model has, in a tensor of `ndim` dimensions."""

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
        """The shape without the axes; None if they are absent or not of size 1."""
        there = tensor.ndim == self.ndim and all(tensor.shape[axis] == 1 for axis in self.axes)
        return tuple(size for axis, size in enumerate(tensor.shape) if axis not in self.axes) if there else None


class ResizeRows(Rule):
    """Truncates a table to the model's rows, or extends it by repeating the last row. One way only."""

    def load(self, name: str, tensor: Tensor, model: TensorDict) -> Entry:
        mine = model.get(name) if self.matches(name) else None
        if mine is None or not tensor.ndim == mine.ndim > 0 or tensor.shape[1:] != mine.shape[1:]:
            return name, tensor
        if len(tensor) not in (0, len(mine)):
            tensor = tensor[torch.arange(len(mine)).clamp(max=len(tensor) - 1)]
        return name, tensor


def _renamed(name: str, pattern: str, replacement: str) -> str:
    match = re.fullmatch(re.escape(pattern).replace(r"\*", "(.*)"), name)
    return replacement.replace("*", "{}").format(*match.groups()) if match else name


POSITIONS = ("pos_embed", "pos_embed_temporal", "pos_embed_spatial", "temp_embed")
KeyMapping = tuple[Rule, ...]

_DROP_POSITIONS = tuple(map(Drop, POSITIONS))  # computed for the requested size, never loaded
_NO_TIME_IN_PATCHES = Squeeze("x_embedder.proj.weight", 5, (2,))  # image models embed patches with a Conv2d
_ONE_KIND_OF_BLOCKS = Rename("blocks.*", "spatial_blocks.*")  # image models have no temporal blocks
_MODULE_PREFIX = tuple(Rename(*pair) for pair in FRAMES_RENAMED if ".attentions." not in pair[0])
_OLD_ATTENTION_NAMES = tuple(Rename(*pair) for pair in FRAMES_RENAMED if ".attentions." in pair[0])
_OLD_ATTENTION_CONVS = tuple(  # diffusers once stored these linear layers as 1x1 convolutions
    Squeeze(f"*.attentions.*.{name}.weight", 4, (2, 3)) for name in ("to_q", "to_k", "to_v", "to_out.0")
)

TRANSFORMER: KeyMapping = (*_DROP_POSITIONS, _NO_TIME_IN_PATCHES, ResizeRows("y_embedder.y_embedding"))
STDIT3: KeyMapping = (
    *_DROP_POSITIONS, _NO_TIME_IN_PATCHES, _ONE_KIND_OF_BLOCKS, ResizeRows("y_embedder.y_embedding"),
)  # fmt: skip
FRAME_AUTOENCODER: KeyMapping = (*_OLD_ATTENTION_NAMES, *_MODULE_PREFIX, *_OLD_ATTENTION_CONVS)
VIDEO_AUTOENCODER: KeyMapping = (*_OLD_ATTENTION_NAMES, *_OLD_ATTENTION_CONVS)
T5: KeyMapping = (*map(Drop, T5_DROPPED), *(Rename(*pair) for pair in T5_RENAMED))
CLIP: KeyMapping = (*map(Drop, CLIP_DROPPED), *(Rename(*pair) for pair in CLIP_RENAMED))

# Class name of a model -> its mapping. A class without a row takes that of its base class, or loads names as they are.
KEY_MAPPINGS: dict[str, KeyMapping] = {
    "STDiT": TRANSFORMER, "STDiT2": TRANSFORMER, "STDiT3": STDIT3,
    "DiT": TRANSFORMER, "Latte": TRANSFORMER,
    "PixArt": TRANSFORMER, "PixArtMS": TRANSFORMER, "PixArt_Sigma": TRANSFORMER,
    "VideoAutoencoderKL": FRAME_AUTOENCODER, "VideoAutoencoderKLTemporalDecoder": FRAME_AUTOENCODER,
    "VideoAutoencoderPipeline": VIDEO_AUTOENCODER, "VAE_Temporal": (),
    "T5EncoderModel": T5, "CLIPText": CLIP,
}  # fmt: skip

# Tensors that only video models have, which are published in our layout.
_VIDEO_ONLY = (Rule("blocks.*.attn_temp.*"), Rule("temporal_blocks.*"))


def mapping_for(model: nn.Module) -> KeyMapping:
    """The key mapping of a model's class."""
    return next((KEY_MAPPINGS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in KEY_MAPPINGS), ())


def to_original(tensors: TensorDict) -> dict[str, Tensor]:
    """Maps tensors in our layout to the layout that the model's authors publish, without positions."""
    rules: KeyMapping = _DROP_POSITIONS
    if not any(rule.matches(name) for rule in _VIDEO_ONLY for name in tensors):
        rules = (*rules, _NO_TIME_IN_PATCHES, _ONE_KIND_OF_BLOCKS, *_MODULE_PREFIX)
    entries: Iterable[Entry | None] = tensors.items()
    for rule in rules:
        entries = [rule.save(*entry) for entry in entries if entry]
    return dict(entry for entry in entries if entry)
