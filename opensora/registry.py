"""Table of contents: the `type` of a configuration section -> what builds it, imported only when it is asked for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from opensora.errors import ConfigError, did_you_mean

MODELS = {
    "STDiT": "opensora.models.stdit.stdit:STDiT",
    "STDiT-XL/2": "opensora.models.stdit.stdit:STDiT",
    "STDiT-XL/2x2": "opensora.models.stdit.stdit:STDiT",
    "STDiT2": "opensora.models.stdit.stdit2:STDiT2",
    "STDiT2-XL/2": "opensora.models.stdit.stdit2:STDiT2",
    "STDiT3": "opensora.models.stdit.stdit3:STDiT3",
    "STDiT3-XL/2": "opensora.models.stdit.stdit3:STDiT3",
    "STDiT3-3B/2": "opensora.models.stdit.stdit3:STDiT3",
    "DiT": "opensora.models.dit.dit:DiT",
    "DiT-XL/2": "opensora.models.dit.dit:DiT",
    "DiT-XL/2x2": "opensora.models.dit.dit:DiT",
    "Latte": "opensora.models.latte.latte:Latte",
    "Latte-XL/2": "opensora.models.latte.latte:Latte",
    "Latte-XL/2x2": "opensora.models.latte.latte:Latte",
    "PixArt": "opensora.models.pixart.pixart:PixArt",
    "PixArt-XL/2": "opensora.models.pixart.pixart:PixArt",
    "PixArt-1B/2": "opensora.models.pixart.pixart:PixArt",
    "PixArtMS": "opensora.models.pixart.pixart:PixArtMS",
    "PixArtMS-XL/2": "opensora.models.pixart.pixart:PixArtMS",
    "PixArt-Sigma": "opensora.models.pixart.pixart_sigma:PixArt_Sigma",
    "PixArt-Sigma-XL/2": "opensora.models.pixart.pixart_sigma:PixArt_Sigma",
}
AUTOENCODERS = {
    "OpenSoraVAE_V1_2": "opensora.models.vae.vae:OpenSoraVAE_V1_2",
    "VideoAutoencoderPipeline": "opensora.models.vae.vae:VideoAutoencoderPipeline",
    "VideoAutoencoderKL": "opensora.models.vae.vae:VideoAutoencoderKL",
    "VideoAutoencoderKLTemporalDecoder": "opensora.models.vae.vae_svd:VideoAutoencoderKLTemporalDecoder",
    "VAE_Temporal": "opensora.models.vae.vae_temporal:VAE_Temporal",
    "VAE_Temporal_SD": "opensora.models.vae.vae_temporal:VAE_Temporal_SD",
}
# What the larger models and those with patches of two frames are built with beside their class's own defaults, XL/2.
LARGE, TWO_FRAMES = {"hidden_size": 1872, "num_heads": 26}, {"patch_size": (2, 2, 2)}
VARIANTS = {
    "STDiT3-3B/2": LARGE, "PixArt-1B/2": LARGE,
    "STDiT-XL/2x2": TWO_FRAMES, "DiT-XL/2x2": TWO_FRAMES, "Latte-XL/2x2": TWO_FRAMES,
}  # fmt: skip
SCHEDULERS = {
    "rflow": "opensora.schedulers.rf:RFLOW",
    "iddpm": "opensora.schedulers.iddpm:IDDPM",
    "iddpm-speed": "opensora.schedulers.iddpm_speed:IDDPM_SPEED",
    "dpm-solver": "opensora.schedulers.dpms:DPM_SOLVER",
}
TEXT_ENCODERS = {
    "t5": "opensora.models.text_encoder.t5:T5Encoder",
    "clip": "opensora.models.text_encoder.clip:CLIPEncoder",
    "classes": "opensora.models.text_encoder.classes:ClassIds",
}
DATASETS = {
    "VideoTextDataset": "opensora.datasets.datasets:VideoTextDataset",
    "VariableVideoTextDataset": "opensora.datasets.datasets:VariableVideoTextDataset",
}
BUILDERS = {**MODELS, **AUTOENCODERS, **SCHEDULERS, **TEXT_ENCODERS, **DATASETS}

# Keys of a section that say what to build, where its weights lie, or how the original accelerated it: no arguments.
NO_ARGUMENTS = {
    "type", "strict", "from_pretrained", "subfolder", "local_files_only", "force_huggingface", "cache_dir",
    "enable_flash_attn", "enable_layernorm_kernel", "enable_sequence_parallelism", "shardformer",
}  # fmt: skip


def check_type(section: str, name: str, table: Mapping[str, str]) -> str:
    """`name`, when `table` has it. Raises ConfigError with the nearest name otherwise."""
    if name not in table:
        hint = did_you_mean(name, table) or ";"
        raise ConfigError(f"{section} type '{name}' is not known{hint} choose one of {', '.join(table)}".lstrip())
    return name


def resolve(target: str) -> Any:
    """The object that `module:name` points at."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def builder(name: str) -> Any:
    """The class or function of a registered `type`."""
    return resolve(BUILDERS[name])


def build(section: Mapping[str, Any]) -> Any:
    """The object that `dict(type=..., keyword=...)` describes; ConfigError on an unknown type, keyword or value."""
    found = {**VARIANTS.get(section["type"], {}), **arguments(section)}
    try:
        return builder(section["type"])(**found)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{section['type']}: {error}") from error


def arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    """What the builder of a section is called with; ConfigError on an unknown type or keyword, naming the nearest."""
    name = check_type("", section["type"], BUILDERS)
    found = {key: value for key, value in section.items() if key not in NO_ARGUMENTS}
    known = keywords(name)
    for key in found:
        if known and key not in known:
            raise ConfigError(f"{name}: unknown setting '{key}'{did_you_mean(key, known)}")
    return found


def keywords(name: str) -> set[str]:
    """The keywords that the builder of a registered `type` takes; empty when it takes any."""
    target = builder(name)
    signature = inspect.signature(target, eval_str=True)
    if inspect.isfunction(target):
        signature = inspect.signature(signature.return_annotation)
    parameters = signature.parameters.values()
    return set() if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}
