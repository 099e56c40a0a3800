"""Hints for the error message when a checkpoint does not fit a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from opensora.checkpoints.prefixes import common_prefix

# Size of a model -> (tensor, axis) pairs that determine it.
SIZES = {
    "hidden_size": (("x_embedder.proj.weight", 0),),
    "in_channels": (("x_embedder.proj.weight", 1),),
    "caption_channels": (("y_embedder.y_proj.fc1.weight", 1),),
    "d_model": (("shared.weight", 1), ("encoder.embed_tokens.weight", 1)),
    "vocab_size": (("shared.weight", 0), ("encoder.embed_tokens.weight", 0)),
    "latent_channels": (("decoder.conv_in.weight", 1), ("module.decoder.conv_in.weight", 1)),
}
BLOCKS = re.compile(r"(?:^|\.)(?:spatial_blocks|blocks|block|layers)\.(\d+)\.")


def mismatch_hint(file: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> str:
    """The end of the error message: a common prefix of all names, or sizes that differ; empty if there is no hint."""
    prefix = common_prefix(file)
    if prefix and not any(name.startswith(prefix) for name in own):
        rest = {name.removeprefix(prefix) for name in file}
        if len(rest & own.keys()) > len(own) / 2:
            remedy = "write the file again without it"
            return f"; all names begin with `{prefix}`, the model's do not: {remedy}"
        if not file.keys() & own.keys():
            return f"; all names begin with `{prefix}`, the model's do not"
    there, here = _sizes(file), _sizes(own)
    differ = [name for name in there if there[name] != here.get(name, there[name])]
    sizes = [f"{name} {there[name]} in the file and {here[name]} in the model" for name in differ]
    return f"; {_config_json(path)}: {', '.join(sizes)}" if sizes else ""


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    found: dict[str, int] = {}
    for size, places in SIZES.items():
        for name, axis in places:
            if name in tensors and tensors[name].ndim > axis:
                found.setdefault(size, tensors[name].shape[axis])
    if depth := _depth(tensors):
        found["depth"] = depth
    return found


def _depth(names: Collection[str]) -> int:
    """The number of complete blocks."""
    sizes = Counter(match[1] for name in names if (match := BLOCKS.search(name)))
    return sum(size == max(sizes.values()) for size in sizes.values())


def _config_json(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        beside = "in this folder" if path.is_dir() else "beside this file"
        return f"there is no config.json {beside} to say the sizes; put it there, or set them in the configuration"
    if path.is_dir():
        return "config.json or the configuration states other sizes"
    return f"config.json beside this file is not read for this name; give the folder, {folder}, or set the sizes"
