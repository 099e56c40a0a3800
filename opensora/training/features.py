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

from opensora import weights
from opensora.errors import ConfigError
from opensora.hub import read_json
from opensora.training.state import replace_text

SHARD = 500


class Features(NamedTuple):
    """Encoded clips: latents [N, C, T, H, W], text [N, L, C_text] and its mask [N, L], all on the CPU."""

    latents: Tensor
    text: Tensor
    mask: Tensor

    def without_padding(self) -> Features:
        """The same with the text cut to the longest one's length."""
        length = int(self.mask.sum(dim=1).max())
        return Features(self.latents, self.text[:, :length], self.mask[:, :length])


Encode = Callable[[range], dict[str, Tensor]]


def encode_once(folder: Path, num_clips: int, identity: dict[str, Any], encode: Encode) -> Features:
    """The features of clips 0..num_clips-1 from `folder`, encoding the shards that are not there yet.

    `encode(indices)` gives one shard's tensors (latents, text, mask). Raises ConfigError when the folder was made
    with another `identity`.
    """
    _claim(folder, identity)
    clips = [range(start, min(start + SHARD, num_clips)) for start in range(0, num_clips, SHARD)]
    files = {folder / f"clips_{part.start:07d}-{part.stop:07d}.safetensors": part for part in clips}
    if missing := [file for file in files if not file.is_file()]:
        from tqdm import tqdm

        for file in tqdm(missing, desc="encoding clips", unit="shard"):
            weights.save_file(encode(files[file]), file)
    shards = [weights.read_state_dict(file) for file in files]
    return Features(*(torch.cat([shard[name] for shard in shards]) for name in Features._fields))


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Writes what the folder holds, or checks that it is the same."""
    described = folder / "features.json"
    wanted = json.loads(json.dumps(identity))
    if described.is_file():
        found = read_json(described)
        if changed := sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key)):
            raise ConfigError(
                f"{folder} was encoded with another {', '.join(changed)}; remove it or name another features folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(described, json.dumps(wanted, indent=1))
