"""Models of a request or a training run, built from a configuration's sections and filled with their weights."""

from __future__ import annotations

from typing import Any

import torch

from opensora import registry
from opensora.acceleration.device import place
from opensora.errors import ConfigError
from opensora.models.text_encoder.t5 import T5_DROPPED, T5Encoder, make_t5
from opensora.weight_rules import Drop
from opensora.weights import Summary, load_weights, locate, read_config_json

DESCRIPTIVE = ("model_type", "type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path")
TRAINING_ONLY = ("freeze_y_embedder", "only_train_temporal", "drop_path", "freeze_vae_2d", "cal_loss")


def load_model(section: dict[str, Any], device: torch.device, dtype: torch.dtype, **extra: Any) -> tuple[Any, Summary]:
    """The diffusion transformer of a `model` section, ready for inference; `offline` in `extra` forbids downloads."""
    return _load(section, registry.MODELS, "model", device, dtype, extra.pop("offline", False), extra)


def load_vae(section: dict[str, Any], device: torch.device, dtype: torch.dtype, offline: bool = False) -> Any:
    """The video autoencoder of a `vae` section and the summary of its weights."""
    return _load(section, registry.AUTOENCODERS, "vae", device, dtype, offline, {})


def load_text_encoder(
    section: dict[str, Any], device: torch.device, dtype: torch.dtype, offline: bool = False
) -> tuple[T5Encoder, Summary]:
    """The text encoder of a `text_encoder` section and the summary of its weights."""
    registry.check_type("text_encoder", section["type"], registry.TEXT_ENCODERS)
    folder = locate(_source(section, "text_encoder"), what="text encoder", offline=offline)
    encoder = make_t5(read_config_json(folder), folder, section.get("model_max_length", 300), dtype)
    summary = load_weights(encoder.model, folder, rules=[Drop(pattern) for pattern in T5_DROPPED])
    encoder.model.to(device)
    return encoder, summary


def _load(
    section: dict[str, Any],
    table: dict[str, str],
    what: str,
    device: torch.device,
    dtype: torch.dtype,
    offline: bool,
    extra: dict[str, Any],
) -> tuple[Any, Summary]:
    """Builds on the meta device, then fills strictly. Keywords: the section's win over the checkpoint's config.json."""
    registry.check_type(what, section["type"], table)
    path = locate(_source(section, what), what=what, subfolder=section.get("subfolder"), offline=offline)
    stated = {key: value for key, value in read_config_json(path).items() if key not in DESCRIPTIVE + TRAINING_ONLY}
    known = registry.keywords(section["type"])
    stated = {key: value for key, value in stated.items() if key in known}
    with torch.device("meta"):
        model = registry.build({**stated, **section, **extra})
    summary = load_weights(model, path, dtype=dtype)
    return place(model.eval().requires_grad_(False), device), summary


def _source(section: dict[str, Any], what: str) -> str:
    source = section.get("from_pretrained")
    if not source:
        raise ConfigError(f"{what} has no weights: set from_pretrained to a folder, a file or a hub id")
    return source
