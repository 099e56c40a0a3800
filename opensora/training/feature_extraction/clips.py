"""Latents and text of a data set, encoded once and kept on disk: training then never runs the frozen encoders.

A features folder holds `features.json` (what was encoded, by which weights) and shards named after their clips.
Encoding resumes at the first missing shard; a folder made from other clips or weights is refused, never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from opensora.checkpoints.hub import read_json
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.save import save_file
from opensora.errors import ConfigError
from opensora.files import why
from opensora.training.checkpoint.state import replace_text

SHARD = 500


class Features(NamedTuple):
    """Encoded clips: latents [N, C, T, H, W], text [N, L, C_text] and its mask [N, L].

    `last` [N, C, H, W] is the last frame of each clip, encoded as an image.
    """

    latents: Tensor
    last: Tensor
    text: Tensor
    mask: Tensor


Encode = Callable[[range], dict[str, Tensor]]


def encode_once(folder: Path, num_clips: int, identity: dict[str, Any], encode: Encode) -> Features:
    """The features of clips 0..num_clips-1 from `folder`, on the CPU, encoding the shards that are not there yet.

    `encode(indices)` gives one shard's tensors by the names in Features; text is cut to the longest one's length.
    Raises ConfigError when the folder was made with another `identity`.
    """
    claim(folder, identity)
    clips = [range(start, min(start + SHARD, num_clips)) for start in range(0, num_clips, SHARD)]
    files = {folder / f"clips_{part.start:07d}-{part.stop:07d}.safetensors": part for part in clips}
    missing = [file for file in files if not file.is_file()]
    for file in tqdm(missing, desc="encoding clips", unit="shard", disable=not missing):
        save_file(encode(files[file]), file)
    shards = [read_state_dict(file) for file in files]
    features = Features(*(torch.cat([shard[name] for shard in shards]) for name in Features._fields))
    length = int(features.mask.sum(dim=1).max())
    return features._replace(text=features.text[:, :length], mask=features.mask[:, :length])


def claim(folder: Path, identity: dict[str, Any], write: bool = True) -> None:
    """Writes what a new folder holds; raises ConfigError if one that is there holds something else.

    Of several ranks one should `write`.
    """
    described, text = folder / "features.json", json.dumps(identity, indent=1)
    if not described.is_file():
        if not write:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(described, text)
        except OSError as error:
            raise ConfigError(f"{described}: cannot be written ({why(error)}); name another folder") from error
    wanted = json.loads(text)
    found = {"tokenizer": wanted.get("tokenizer"), **read_json(described)}  # earlier versions did not note it
    if changed := sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key)):
        remedy = "remove it or name another features folder"
        raise ConfigError(f"{folder} was encoded with another {', '.join(changed)}; {remedy}")
