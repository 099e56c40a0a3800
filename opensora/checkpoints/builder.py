"""Builds the components of a configuration (model, vae, text_encoder) and loads their weights."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora import registry
from opensora.acceleration.offload import offload_blocks
from opensora.acceleration.packed_tensor import unpack_weights
from opensora.acceleration.placement import to_device
from opensora.acceleration.quantization import quantize
from opensora.checkpoints.fit import load_weights
from opensora.checkpoints.gguf_t5 import t5_config, t5_header, t5_pieces, t5_tokenizer_hash
from opensora.checkpoints.hub import locate, one_line, read_config_json
from opensora.checkpoints.sections import WITHOUT_WEIGHTS, Section, check_section
from opensora.checkpoints.summary import Summary
from opensora.checkpoints.tokenizer import (
    load_clip_tokenizer,
    load_t5_tokenizer,
    make_t5_tokenizer,
    tokenizer_files,
    tokenizer_hash,
)
from opensora.config.schema import check
from opensora.config.sections import checked
from opensora.config.sections.checkpoints import CLIPConfig, CLIPTextConfig, ModelMetadata, T5Config
from opensora.distributed.fsdp import shard
from opensora.distributed.process_group import RankLayout
from opensora.errors import ConfigError, OpenSoraError, WeightsError
from opensora.models.text_encoder import t5
from opensora.models.text_encoder.clip import make_clip
from opensora.models.text_encoder.tokens import Tokenizer
from opensora.profiling.memory_meter import free_on_host
from opensora.profiling.meta_shapes import MetaShapes

TRAINING_ONLY = ("freeze", "freeze_y_embedder", "only_train_temporal", "drop_path", "freeze_vae_2d", "cal_loss")
TEXT_CONFIGS = {"t5": T5Config, "clip": CLIPConfig, "clip_text": CLIPTextConfig}
MAX_LENGTHS = {"t5": 300, "clip": 77}  # tokens, where a section does not say
SINGLE_RANK = RankLayout()


def find_weights(section: Section, what: str, offline: bool = False) -> Path | None:
    """The local file or folder of a section's weights, downloaded if needed; None if the type has no weights.

    Raises WeightsError if it cannot be found.
    """
    check_section(section, what)
    if section["type"] in WITHOUT_WEIGHTS:
        return None
    return locate_weights(section, what, offline)


def locate_weights(section: Section, what: str, offline: bool = False) -> Path:
    """The local file or folder of a section's `from_pretrained`, with `subfolder`, `cache_dir`, `local_files_only`.

    Raises WeightsError if it cannot be found.
    """
    where = {key: section[key] for key in ("subfolder", "cache_dir", "local_files_only") if section.get(key)}
    return locate(section["from_pretrained"], what=what, offline=offline, **where)


def build_model(
    section: Section, path: Path | None, defaults: Section | None = None, forced: Section | None = None
) -> Any:
    """Builds a "model" or "vae" section on the meta device, without weights.

    Keywords come from `defaults`, the checkpoint's config.json, the section, and `forced`; later ones override. With
    `strict=False` in the section the model is initialized instead, for tensors that the checkpoint lacks.
    """
    known = registry.keywords(section["type"]).difference(TRAINING_ONLY)
    stated = stated_keywords(section["type"], path, known) if path else {}
    keywords = {**{key: value for key, value in (defaults or {}).items() if key in known}, **stated}
    forced = {key: value for key, value in (forced or {}).items() if key in known}
    section = {**keywords, **section, **forced}
    with torch.device("meta"), MetaShapes():
        built = registry.build(section)
    if section.get("strict", True):
        return built
    _check_room(built, section["type"])
    return registry.build(section)


def _check_room(model: nn.Module, name: str) -> None:
    """Raises ConfigError unless a model on the meta device would fit into free host memory."""
    need = sum(tensor.nbytes for tensor in model.state_dict().values())
    try:
        free = free_on_host()
    except (OSError, KeyError):
        return
    if need > free:
        sizes = f"{need / 2**30:,.0f} GiB, and {free / 2**30:,.0f} GiB are free"
        raise ConfigError(f"{name} of these sizes takes {sizes}; reduce hidden_size or depth")


def stated_keywords(name: str, path: Path, known: Collection[str]) -> dict[str, Any]:
    """The `known` keywords in a checkpoint's config.json, validated for a type. Raises WeightsError."""
    stated = {key: value for key, value in config_json(path).items() if key in known}
    found = checked({"type": name, **stated}, where=str(config_file(path)), error=WeightsError)
    return {key: found[key] for key in stated}


def load_model_weights(
    model: Any, section: Section, path: Path, device: torch.device, dtype: torch.dtype, linear: str = "exact"
) -> Summary:
    """Loads the weights of a built model and makes it ready for inference; returns a summary of the checkpoint.

    `linear` "int8" or "fp8" quantizes the linear layers of its blocks, which is approximate.
    """
    summary = load_weights(model, path, dtype=dtype, strict=section.get("strict", True), device=device)
    model = model.eval().requires_grad_(False)
    to_device(model if linear == "exact" else quantize(model, linear), device)
    return summary


def build_text_encoder(section: Section, path: Path | None, dtype: torch.dtype) -> Any:
    """Builds the text encoder of a section with its tokenizer, without weights."""
    if path is None:
        return registry.build(section)
    folder, kind, header = _folder(path), section["type"], t5_header(path)
    config = t5_config(header) if header else config_json(path)
    schema = TEXT_CONFIGS["clip_text" if kind == "clip" and "text_config" not in config else kind]
    stated: Any = check(schema, config, str(config_file(path)), WeightsError)
    length = section.get("model_max_length", MAX_LENGTHS[kind])
    try:
        encoder: Any
        if kind == "t5":
            encoder = t5.make_t5(t5.T5Config(**dict(stated)), _t5_tokenizer(path), length, dtype)
        else:
            encoder = make_clip(config, load_clip_tokenizer(tokenizer_folder(path)), length, dtype)
    except OpenSoraError:
        raise
    except Exception as error:  # the tokenizers' libraries raise anything
        name = kind.upper()
        raise WeightsError(f"{folder}: no usable {name} configuration and tokenizer ({one_line(error)})") from error
    _check_vocabulary(encoder, folder)
    return encoder


def tokenizer_sha256(path: Path | None) -> dict[str, str]:
    """{"tokenizer": SHA-256} of the tokenizer beside a text encoder's weights; empty if there are no weights."""
    if path is None:
        return {}
    header = t5_header(path)
    if header and t5_pieces(header, path):
        return {"tokenizer": t5_tokenizer_hash(header)}
    return {"tokenizer": tokenizer_hash(tokenizer_folder(path))}


def _t5_tokenizer(path: Path) -> Tokenizer:
    """T5's tokenizer, inside or beside its weights."""
    header = t5_header(path)
    pieces = t5_pieces(header, path) if header else None
    return make_t5_tokenizer(*pieces, path) if pieces else load_t5_tokenizer(tokenizer_folder(path))


def tokenizer_folder(path: Path) -> Path:
    """The folder of a text encoder's tokenizer: that of its weights, or `tokenizer/` beside it, as diffusers has it."""
    own, beside = _folder(path), _folder(path).parent / "tokenizer"
    return beside if not tokenizer_files(own) and tokenizer_files(beside) else own


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _check_vocabulary(encoder: Any, folder: Path) -> None:
    """Raises WeightsError for a tokenizer with more tokens than its model."""
    config = getattr(encoder.model, "text_model", encoder.model).config
    known, tokens = config.vocab_size, encoder.tokenizer.vocab_size
    if tokens > known:
        raise WeightsError(
            f"{folder}: its tokenizer has {tokens:,} tokens, its model {known:,}; they belong to different models"
        )


def load_text_encoder_weights(
    encoder: Any, section: Section, path: Path, device: torch.device, layout: RankLayout = SINGLE_RANK,
    offload: bool = False,
) -> Summary:  # fmt: skip
    """Loads the weights of a built text encoder; returns a summary of the checkpoint.

    `shardformer=True` in the section shards them over the ranks, which must then encode in step. Otherwise `offload`
    keeps those of its blocks on the host, except while a block runs.
    """
    if section.get("shardformer"):
        summary = load_weights(encoder.model, path)
        unpack_weights(encoder.model)  # shards are plain tensors
        shard(encoder.model, layout)
    elif offload:
        summary = load_weights(encoder.model, path)
        offload_blocks(encoder.model, device)
        return summary
    else:
        summary = load_weights(encoder.model, path, device=device)
    to_device(encoder.model, device)
    return summary


def load_component(
    section: Section, what: str, device: torch.device, dtype: torch.dtype, offline: bool = False,
    layout: RankLayout = SINGLE_RANK,
) -> tuple[Any, Summary]:  # fmt: skip
    """Builds and loads a "model", "vae" or "text_encoder" for inference; returns it and a summary of the checkpoint."""
    path = find_weights(section, what, offline)
    if path is None:
        raise ConfigError(f"{what} of type '{section['type']}' has no weights")
    if what == "text_encoder":
        encoder = build_text_encoder(section, path, dtype)
        return encoder, load_text_encoder_weights(encoder, section, path, device, layout)
    built = build_model(section, path)
    return built, load_model_weights(built, section, path, device, dtype)


def trained_sizes(path: Path) -> list[list[int]]:
    """The sizes (frames, height, width) a checkpoint was trained on, as stated in config.json; may be empty."""
    stated: ModelMetadata = check(ModelMetadata, config_json(path), str(config_file(path)), WeightsError)
    return [list(size) for size in stated.trained_sizes]


def config_json(path: Path) -> dict[str, Any]:
    """The config.json of the weights at `path`; that of a training checkpoint or its ema.pt is in model/."""
    return read_config_json(path) or read_config_json(_folder(path) / "model")


def config_file(path: Path) -> Path:
    """The path of the config.json that `config_json` reads."""
    return (_folder(path) if read_config_json(path) else _folder(path) / "model") / "config.json"
