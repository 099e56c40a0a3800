"""Sections of a configuration: the keywords that each component `type` accepts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opensora.config.schema import check, shown
from opensora.config.sections import autoencoders, data, encoders, models, schedulers
from opensora.config.sections.common import Section
from opensora.errors import ConfigError, OpenSoraError, did_you_mean

MODELS: dict[str, type[models.Transformer]] = {
    **dict.fromkeys(("STDiT", "STDiT-XL/2", "STDiT-XL/2x2"), models.STDiT),
    **dict.fromkeys(("STDiT2", "STDiT2-XL/2"), models.STDiT2),
    **dict.fromkeys(("STDiT3", "STDiT3-XL/2", "STDiT3-3B/2"), models.STDiT3),
    **dict.fromkeys(("DiT", "DiT-XL/2", "DiT-XL/2x2"), models.DiT),
    **dict.fromkeys(("Latte", "Latte-XL/2", "Latte-XL/2x2"), models.Latte),
    **dict.fromkeys(("PixArt", "PixArt-XL/2", "PixArt-1B/2"), models.PixArt),
    **dict.fromkeys(("PixArtMS", "PixArtMS-XL/2"), models.PixArtMS),
    **dict.fromkeys(("PixArt-Sigma", "PixArt-Sigma-XL/2"), models.PixArtSigma),
}
AUTOENCODERS: dict[str, type[Section]] = {
    "OpenSoraVAE_V1_2": autoencoders.OpenSoraVAE,
    "VideoAutoencoderPipeline": autoencoders.VideoAutoencoderPipeline,
    "VideoAutoencoderKL": autoencoders.VideoAutoencoderKL,
    "VideoAutoencoderKLTemporalDecoder": autoencoders.VideoAutoencoderKLTemporalDecoder,
    "VAE_Temporal": autoencoders.VAETemporal,
    "VAE_Temporal_SD": autoencoders.VAETemporal,
}
SCHEDULERS: dict[str, type[Section]] = {
    "rflow": schedulers.RFLOW, "iddpm": schedulers.IDDPM, "iddpm-speed": schedulers.IDDPMSpeed,
    "dpm-solver": schedulers.DPMSolver,
}  # fmt: skip
TEXT_ENCODERS: dict[str, type[Section]] = {"t5": encoders.T5, "clip": encoders.CLIP, "classes": encoders.Classes}
DATASETS: dict[str, type[Section]] = {
    "VideoTextDataset": data.VideoTextDataset, "VariableVideoTextDataset": data.VariableVideoTextDataset,
    "EncodedDataset": data.EncodedDataset, "BatchFeatureDataset": data.EncodedDataset, "ShapeClips": data.ShapeClips,
    "WorldClips": data.WorldClips,
}  # fmt: skip
SECTIONS: dict[str, dict[str, type[Section]]] = {
    "model": {**MODELS, **AUTOENCODERS}, "vae": AUTOENCODERS, "text_encoder": TEXT_ENCODERS,
    "scheduler": SCHEDULERS, "dataset": DATASETS, "restorer": {**MODELS},
}  # fmt: skip
TYPES: dict[str, type[Section]] = {name: kind for table in SECTIONS.values() for name, kind in table.items()}


def check_type(section: str, name: Any, table: Mapping[str, Any]) -> str:
    """Returns `name` if `table` has it, else raises ConfigError with the nearest name."""
    if not isinstance(name, str) or name not in table:
        hint = (did_you_mean(name, table) if isinstance(name, str) else "") or ";"
        raise ConfigError(f"{section} type {shown(name)} is not known{hint} choose one of {', '.join(table)}".lstrip())
    return name


def checked(
    section: Mapping[str, Any], key: str = "", where: str = "", error: type[OpenSoraError] = ConfigError
) -> dict[str, Any]:
    """Validates a section; returns the keywords it gives, with ints and tuples normalized. `key` is its name.

    Raises `error`; its message begins with `where`.
    """
    return given(check(TYPES[check_type(key, section.get("type"), TYPES)], dict(section), where, error, key=key))


def given(found: Section) -> dict[str, Any]:
    """The keywords that were given, also in nested sections."""
    return found.model_dump(exclude_unset=True)
