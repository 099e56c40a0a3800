"""Models of a request or a training run, built from a configuration's sections and filled with their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from opensora import registry
from opensora.acceleration.device import place
from opensora.errors import ConfigError, OpenSoraError, WeightsError
from opensora.hub import locate, one_line, read_config_json
from opensora.models.text_encoder.t5 import T5_DROPPED, make_t5
from opensora.weight_rules import Drop
from opensora.weights import Summary, load_weights

TRAINING_ONLY = ("freeze_y_embedder", "only_train_temporal", "drop_path", "freeze_vae_2d", "cal_loss")
TABLES = {"model": registry.MODELS, "vae": registry.AUTOENCODERS, "text_encoder": registry.TEXT_ENCODERS}
Section = dict[str, Any]
Loaded = tuple[Any, Summary]  # a part, ready for inference, and the summary of its weights


def check(section: Section, what: str) -> None:
    """Raises ConfigError unless a "model", "vae" or "text_encoder" section can be built and names its weights."""
    registry.check_type(what, section["type"], TABLES[what])
    registry.arguments(section)
    if not section.get("from_pretrained"):
        raise ConfigError(f"{what} has no weights: set from_pretrained to a folder, a file or a hub id")


def find(section: Section, what: str, offline: bool = False) -> Path:
    """The file or folder of a section's weights, downloaded if need be, not read; WeightsError if there is none."""
    check(section, what)
    return locate(section["from_pretrained"], what=what, subfolder=section.get("subfolder"), offline=offline)


def load_model(section: Section, device: torch.device, dtype: torch.dtype, offline: bool = False) -> Loaded:
    """The diffusion transformer of a `model` section."""
    return _load(section, "model", device, dtype, offline)


def load_vae(section: Section, device: torch.device, dtype: torch.dtype, offline: bool = False) -> Loaded:
    """The video autoencoder of a `vae` section."""
    return _load(section, "vae", device, dtype, offline)


def load_text_encoder(section: Section, device: torch.device, dtype: torch.dtype, offline: bool = False) -> Loaded:
    """The T5Encoder of a `text_encoder` section."""
    path = find(section, "text_encoder", offline)
    folder = path if path.is_dir() else path.parent
    try:
        encoder = make_t5(_config_json(path), folder, section.get("model_max_length", 300), dtype)
    except OpenSoraError:
        raise
    except Exception as error:  # the tokenizer's libraries raise anything
        raise WeightsError(f"{folder}: no usable T5 configuration and tokenizer ({one_line(error)})") from error
    summary = load_weights(encoder.model, path, rules=[Drop(pattern) for pattern in T5_DROPPED])
    encoder.model.to(device)
    return encoder, summary


def trained_sizes(path: Path) -> list[list[int]]:
    """The (frames, height, width) that a checkpoint says it was trained on; empty when it does not say."""
    return _config_json(path).get("trained_sizes", [])


def _load(section: Section, what: str, device: torch.device, dtype: torch.dtype, offline: bool) -> Loaded:
    """Builds on the meta device, then fills strictly. Keywords: the section's win over the checkpoint's config.json."""
    path = find(section, what, offline)
    known = registry.keywords(section["type"]).difference(TRAINING_ONLY)
    stated = {key: value for key, value in _config_json(path).items() if key in known}
    with torch.device("meta"):
        model = registry.build({**stated, **section})
    summary = load_weights(model, path, dtype=dtype)
    return place(model.eval().requires_grad_(False), device), summary


def _config_json(path: Path) -> dict[str, Any]:
    """What config.json states about the weights at `path`; a training checkpoint and its ema.pt have it in model/."""
    return read_config_json(path) or read_config_json((path if path.is_dir() else path.parent) / "model")
