"""CLIP and its aesthetic head from the user's files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opensora.acceleration.device import pick_device
from opensora.checkpoints.builder import config_file, config_json
from opensora.checkpoints.fit import load_weights
from opensora.checkpoints.hub import one_line
from opensora.checkpoints.key_mapping import Drop
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.remembered_hash import FileIdentity
from opensora.checkpoints.tokenizer import load_clip_tokenizer, tokenizer_hash
from opensora.config.schema import check
from opensora.config.sections.checkpoints import CLIPImageTextConfig
from opensora.errors import OpenSoraError, WeightsError
from opensora.models.image_text_scores import AestheticHead, CLIPImageText, make_clip_image_text
from opensora.models.text_encoder.tokens import Tokenizer

NO_POSITIONS = (Drop("*embeddings.position_ids"),)


class Scorer(NamedTuple):
    """Models on one device, with the tokenizer and sizes of CLIP. Without weights for it there is no `head`."""

    clip: CLIPImageText
    head: AestheticHead | None
    tokenizer: Tokenizer
    image_size: int
    max_tokens: int
    device: torch.device


@lru_cache(maxsize=1)
def load_scorer(clip: str, aesthetic: str, device: str | None) -> Scorer:
    """CLIP from a folder or file of its published layout, the head from a file (empty: none); kept in memory.

    Raises WeightsError for missing, damaged and unfitting files, ConfigError for devices that are not there.
    """
    path, where = Path(clip), pick_device(device)
    config = config_json(path)
    sizes: Any = check(CLIPImageTextConfig, config, str(config_file(path)), WeightsError)
    folder = path if path.is_dir() else path.parent
    try:
        model, tokenizer = make_clip_image_text(config), load_clip_tokenizer(folder)
    except OpenSoraError:
        raise
    except Exception as error:  # transformers raises anything
        raise WeightsError(f"{folder}: no usable CLIP configuration and tokenizer ({one_line(error)})") from error
    if tokenizer.vocab_size > sizes.text_config.vocab_size:
        raise WeightsError(f"{folder}: its tokenizer has more tokens than its model; they belong to different models")
    load_weights(model, path, mapping=NO_POSITIONS, dtype=torch.float32)
    head = None
    if aesthetic:
        head = AestheticHead(sizes.projection_dim).eval().requires_grad_(False)
        load_weights(head, aesthetic, mapping=(), dtype=torch.float32)
        head = head.to(where)
    positions = sizes.text_config.max_position_embeddings
    return Scorer(model.to(where), head, tokenizer, sizes.vision_config.image_size, positions, where)


@lru_cache
def scorer_hashes(clip: str, aesthetic: str) -> dict[str, str]:
    """SHA-256 of the contents of these weights and of the tokenizer, by name. Raises WeightsError."""
    folder = Path(clip) if Path(clip).is_dir() else Path(clip).parent
    found = {"clip": clip} | ({"aesthetic": aesthetic} if aesthetic else {})
    for name, path in found.items():
        if not Path(path).exists():
            raise WeightsError(f"scores.{name}: {path} does not exist; name a local file or folder")
    return {name: _content_hash(Path(path)) for name, path in found.items()} | {"tokenizer": tokenizer_hash(folder)}


def _content_hash(path: Path) -> str:
    identity = FileIdentity(path)
    return identity.content_hash(read_state_dict(path))
