"""Latents and text of a data set, encoded once and kept on disk: training then never runs the frozen encoders.

A features folder holds `features.json` (what was encoded, by which weights) and shards of a fixed number of clips.
Encoding resumes at the first missing shard; a folder made from other clips or weights is refused, never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from opensora import weights
from opensora.errors import ConfigError

SHARD = 500


class Features(NamedTuple):
    """Encoded clips: latents [N, C, T, H, W], text [N, L, C_text] and its mask [N, L], all on the CPU."""

    latents: Tensor
    text: Tensor
    mask: Tensor


Encode = Callable[[range], dict[str, Tensor]]


def encode_once(folder: Path, num_clips: int, identity: dict[str, Any], encode: Encode) -> Features:
    """The features of clips 0..num_clips-1 from `folder`, encoding the shards that are not there yet.

    `encode(indices)` gives one shard's tensors (latents, text, mask). Raises ConfigError when the folder was made
    with another `identity`.
    """
    _claim(folder, identity)
    missing = [start for start in range(0, num_clips, SHARD) if not _shard(folder, start).is_file()]
    if missing:
        from tqdm import tqdm

        for start in tqdm(missing, desc="encoding clips", unit="shard"):
            weights.save_file(encode(range(start, start + SHARD)), _shard(folder, start))
    shards = [load_file(_shard(folder, start)) for start in range(0, num_clips, SHARD)]
    return Features(*(torch.cat([shard[name] for shard in shards])[:num_clips] for name in Features._fields))


def _shard(folder: Path, start: int) -> Path:
    return folder / f"clips_{start:07d}.safetensors"


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Writes what the folder holds, or checks that it is the same."""
    described = folder / "features.json"
    wanted = json.loads(json.dumps(identity))
    if described.is_file():
        found = json.loads(described.read_text())
        if changed := sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key)):
            raise ConfigError(
                f"{folder} was encoded with another {', '.join(changed)}; remove it or name another features folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    described.write_text(json.dumps(wanted, indent=1))
