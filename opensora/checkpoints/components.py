"""Models of a request or a training run, built from a configuration's sections and filled with their weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora import registry
from opensora.acceleration.device import place
from opensora.acceleration.quantization import quantize
from opensora.checkpoints.fit import load_weights
from opensora.checkpoints.hub import locate, one_line, read_config_json
from opensora.checkpoints.key_mapping import Drop, Rename
from opensora.checkpoints.summary import Summary
from opensora.checkpoints.tokenizer import check_tokenizer, tokenizer_hash
from opensora.config.schema import check as check_value
from opensora.config.sections import check_type, checked
from opensora.config.sections.checkpoints import CLIPConfig, CLIPTextConfig, ModelMetadata, T5Config, TokenizerConfig
from opensora.distributed.fsdp import Layout, shard
from opensora.errors import ConfigError, OpenSoraError, WeightsError
from opensora.files import read_json
from opensora.models.text_encoder.clip import CLIP_DROPPED, CLIP_RENAMED, make_clip
from opensora.models.text_encoder.t5 import T5_DROPPED, make_t5
from opensora.profiling.memory_meter import free_on_host

TRAINING_ONLY = ("freeze", "freeze_y_embedder", "only_train_temporal", "drop_path", "freeze_vae_2d", "cal_loss")
TABLES = {"model": registry.MODELS, "vae": registry.AUTOENCODERS, "text_encoder": registry.TEXT_ENCODERS}
TEXT_CONFIGS = {"t5": T5Config, "clip": CLIPConfig, "clip_text": CLIPTextConfig}
WITHOUT_WEIGHTS = ("classes",)
TEXT_RULES = {
    "t5": [Drop(pattern) for pattern in T5_DROPPED],
    "clip": [*(Drop(pattern) for pattern in CLIP_DROPPED), *(Rename(*pair) for pair in CLIP_RENAMED)],
}
MAX_LENGTHS = {"t5": 300, "clip": 77}  # tokens, where a section does not say
Section = Mapping[str, Any]
ALONE = Layout()  # one rank


def check(section: Section, what: str) -> None:
    """Raises ConfigError unless a "model", "vae" or "text_encoder" section can be built and names its weights."""
    check_type(what, section.get("type"), TABLES[what])
    checked(section, what)
    if not section.get("from_pretrained") and section["type"] not in WITHOUT_WEIGHTS:
        raise ConfigError(f"{what} has no weights: set from_pretrained to a folder, a file or a hub id")


def find(section: Section, what: str, offline: bool = False) -> Path | None:
    """The file or folder of a section's weights (None: it has none), downloaded if need be, not read.

    Raises WeightsError if they cannot be had.
    """
    check(section, what)
    if section["type"] in WITHOUT_WEIGHTS:
        return None
    return located(section, what, offline)


def located(section: Section, what: str, offline: bool = False) -> Path:
    """The file or folder that a section names as `from_pretrained`, as its `subfolder`, `cache_dir` and
    `local_files_only` say. Raises WeightsError if it cannot be had.
    """
    where = {key: section[key] for key in ("subfolder", "cache_dir", "local_files_only") if section.get(key)}
    return locate(section["from_pretrained"], what=what, offline=offline, **where)


def build(section: Section, path: Path | None, defaults: Section | None = None, forced: Section | None = None) -> Any:
    """The model of a "model" or "vae" section without its weights, on the meta device.

    Keywords come from `defaults`, the checkpoint's config.json, the section, and `forced`; the later ones win. With
    `strict=False` in the section the model has initial values instead, for what the checkpoint may lack.
    """
    known = registry.keywords(section["type"]).difference(TRAINING_ONLY)
    stated = stated_keywords(section["type"], path, known) if path else {}
    keywords = {**{key: value for key, value in (defaults or {}).items() if key in known}, **stated}
    forced = {key: value for key, value in (forced or {}).items() if key in known}
    section = {**keywords, **section, **forced}
    with torch.device("meta"):
        built = registry.build(section)
    if section.get("strict", True):
        return built
    _check_room(built, section["type"])
    return registry.build(section)


def _check_room(model: nn.Module, name: str) -> None:
    """Raises ConfigError unless a model on the meta device would fit into the host's free memory."""
    need = sum(tensor.nbytes for tensor in model.state_dict().values())
    try:
        free = free_on_host()
    except (OSError, KeyError):
        return
    if need > free:
        sizes = f"{need / 2**30:,.0f} GiB, and {free / 2**30:,.0f} GiB are free"
        raise ConfigError(f"{name} of these sizes takes {sizes}; make hidden_size or depth smaller")


def stated_keywords(name: str, path: Path, known: Collection[str]) -> dict[str, Any]:
    """Those of the `known` keywords of a type that the config.json of a checkpoint states. Raises WeightsError."""
    stated = {key: value for key, value in config_json(path).items() if key in known}
    found = checked({"type": name, **stated}, where=str(config_file(path)), error=WeightsError)
    return {key: found[key] for key in stated}


def fill(
    model: Any, section: Section, path: Path, device: torch.device, dtype: torch.dtype, linear: str = "exact"
) -> Summary:
    """Gives a built model its weights and makes it ready for inference; returns what was read.

    Where `linear` is "int8" or "fp8" the linear layers of its blocks compute in 8 bits, which is an approximation.
    """
    summary = load_weights(model, path, dtype=dtype, strict=section.get("strict", True))
    model = model.eval().requires_grad_(False)
    place(model if linear == "exact" else quantize(model, linear), device)
    return summary


def build_text_encoder(section: Section, path: Path | None, dtype: torch.dtype) -> Any:
    """The text encoder of a section with its tokenizer, but without its weights."""
    if path is None:
        return registry.build(section)
    folder, kind = _folder(path), section["type"]
    make, config = {"t5": make_t5, "clip": make_clip}[kind], config_json(path)
    check_value(TEXT_CONFIGS["clip_text" if kind == "clip" and "text_config" not in config else kind], config,
                str(config_file(path)), WeightsError)  # fmt: skip
    check_tokenizer(folder)
    if (tokenizer := folder / "tokenizer_config.json").is_file():
        check_value(TokenizerConfig, read_json(tokenizer, WeightsError), str(tokenizer), WeightsError)
    try:
        encoder = make(config, folder, section.get("model_max_length", MAX_LENGTHS[kind]), dtype)
        _check_vocabulary(encoder, folder)
        return encoder
    except OpenSoraError:
        raise
    except Exception as error:  # the tokenizer's libraries raise anything
        name = kind.upper()
        raise WeightsError(f"{folder}: no usable {name} configuration and tokenizer ({one_line(error)})") from error


def tokenizer_sha256(path: Path | None) -> dict[str, str]:
    """The hash of the tokenizer beside a text encoder's weights as `tokenizer`; empty where there are no weights."""
    return {"tokenizer": tokenizer_hash(_folder(path))} if path else {}


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _check_vocabulary(encoder: Any, folder: Path) -> None:
    """Raises WeightsError for a tokenizer that knows more tokens than its model, or none to pad with."""
    config = getattr(encoder.model, "text_model", encoder.model).config
    known, tokens = config.vocab_size, encoder.tokenizer.vocab_size
    if tokens > known:
        raise WeightsError(
            f"{folder}: its tokenizer has {tokens:,} tokens, its model {known:,}; one is of another model"
        )
    if encoder.tokenizer.pad_token_id is None:
        raise WeightsError(f"{folder}: its tokenizer has no padding token; get tokenizer_config.json again")


def fill_text_encoder(
    encoder: Any, section: Section, path: Path, device: torch.device, layout: Layout = ALONE,
    put: Callable[[nn.Module, torch.device], Any] = place,
) -> Summary:  # fmt: skip
    """Gives a built text encoder its weights, which `put` then brings to the device; returns what was read.

    With `shardformer=True` in the section they are sharded over the ranks, which then have to encode at the same time.
    """
    summary = load_weights(encoder.model, path, rules=TEXT_RULES[section["type"]])
    if section.get("shardformer"):
        shard(encoder.model, layout)
        put = place
    put(encoder.model, device)
    return summary


def load(
    section: Section, what: str, device: torch.device, dtype: torch.dtype, offline: bool = False,
    layout: Layout = ALONE,
) -> tuple[Any, Summary]:  # fmt: skip
    """A "model", "vae" or "text_encoder" that stands for itself, ready for inference, and what was read."""
    path = find(section, what, offline)
    if path is None:
        raise ConfigError(f"{what} of type '{section['type']}' has no weights")
    if what == "text_encoder":
        encoder = build_text_encoder(section, path, dtype)
        return encoder, fill_text_encoder(encoder, section, path, device, layout)
    built = build(section, path)
    return built, fill(built, section, path, device, dtype)


def trained_sizes(path: Path) -> list[list[int]]:
    """The (frames, height, width) that a checkpoint says it was trained on; empty when it does not say."""
    found = check_value(ModelMetadata, config_json(path), str(config_file(path)), WeightsError).trained_sizes
    return [list(size) for size in found]


def config_json(path: Path) -> dict[str, Any]:
    """What config.json states about the weights at `path`; a training checkpoint and its ema.pt have it in model/."""
    return read_config_json(path) or read_config_json(_folder(path) / "model")


def config_file(path: Path) -> Path:
    """The config.json that `config_json` reads."""
    return (_folder(path) if read_config_json(path) else _folder(path) / "model") / "config.json"


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
