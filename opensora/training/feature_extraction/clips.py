"""Latents and text of a data set, encoded once and kept on disk: training then never runs the frozen encoders.

A features folder holds `features.json` (what was encoded, by which weights) and shards named after their clips.
Encoding resumes at the first missing shard; a folder made from other clips or weights is refused, never mixed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.save import save_file
from opensora.training.feature_extraction.identity import claim_folder

SHARD = 500


class Features(NamedTuple):
    """Encoded clips: latents [N, C, T, H, W], text [N, L, C_text] and its mask [N, L].

    `last` [N, C, H, W] is the last frame of each clip, encoded as an image; `altered` latents like `latents`, of the
    clips with another color or shape, for `input_perturbation`, else empty.
    """

    latents: Tensor
    last: Tensor
    text: Tensor
    mask: Tensor
    altered: Tensor = torch.empty(0)

    def rows(self, rows: Tensor) -> Features:
        """The features of some clips."""
        return Features(*(tensor[rows] if len(tensor) else tensor for tensor in self))


Encode = Callable[[range], dict[str, Tensor]]


def encode_once(folder: Path, num_clips: int, identity: dict[str, Any], encode: Encode) -> Features:
    """The features of clips 0..num_clips-1 from `folder`, on the CPU, encoding the shards that are not there yet.

    `encode(indices)` gives one shard's tensors by the names in Features; text is cut to the longest one's length.
    Raises ConfigError when the folder was made with another `identity`.
    """
    claim_folder(folder, identity)
    clips = [range(start, min(start + SHARD, num_clips)) for start in range(0, num_clips, SHARD)]
    files = {folder / f"clips_{part.start:07d}-{part.stop:07d}.safetensors": part for part in clips}
    missing = [file for file in files if not file.is_file()]
    for file in tqdm(missing, desc="encoding clips", unit="shard", disable=not missing):
        save_file(encode(files[file]), file)
    shards = [read_state_dict(file) for file in files]
    names = [name for name in Features._fields if name in shards[0]]
    features = Features(**{name: torch.cat([shard[name] for shard in shards]) for name in names})
    length = int(features.mask.sum(dim=1).max())
    return features._replace(text=features.text[:, :length], mask=features.mask[:, :length])
