"""Registry: the `type` of a configuration section -> the class or function that builds it, imported on demand."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from opensora.config.sections import TYPES, check_type, checked
from opensora.errors import ConfigError

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
# Variants that differ from the XL/2 defaults of their class.
LARGE, TWO_FRAMES = {"hidden_size": 1872, "num_heads": 26}, {"patch_size": (2, 2, 2)}
VARIANTS: dict[str, dict[str, Any]] = {
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


def resolve(target: str) -> Any:
    """Imports the object `module:name`."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def builder(name: str) -> Any:
    """The class or function of a registered `type`."""
    return resolve(BUILDERS[name])


def build(section: Mapping[str, Any]) -> Any:
    """Builds the object of a section. Raises ConfigError for an unknown type, keyword or value."""
    name = check_type("", section.get("type"), TYPES)
    found = arguments({**VARIANTS.get(name, {}), **section})
    checked({**TYPES[name].defaults(), **found, "type": name}, where=name)  # validates constraints between all keywords
    try:
        return builder(name)(**found)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error


def arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments that a section gives its builder. Raises ConfigError, naming the nearest keyword."""
    return {key: value for key, value in checked(section).items() if key in keywords(section["type"])}


def keywords(name: str) -> set[str]:
    """The keyword arguments of a registered `type`."""
    return TYPES[check_type("", name, TYPES)].arguments()
