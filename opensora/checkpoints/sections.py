"""What a section of a configuration says of its weights, as far as that is certain without torch and network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opensora import registry
from opensora.checkpoints.hub import EMBEDDED, SUFFIXES, locate
from opensora.config.sections import check_type, checked
from opensora.errors import ConfigError

TABLES = {"model": registry.MODELS, "vae": registry.AUTOENCODERS, "text_encoder": registry.TEXT_ENCODERS}
WITHOUT_WEIGHTS = ("classes",)
Section = Mapping[str, Any]


def check_section(section: Section, what: str) -> None:
    """Raises ConfigError unless a "model", "vae" or "text_encoder" section is valid and names its weights."""
    check_type(what, section.get("type"), TABLES[what])
    checked(section, what)
    if not section.get("from_pretrained") and section["type"] not in WITHOUT_WEIGHTS:
        raise ConfigError(f"{what} has no weights: set from_pretrained to a folder, a file or a hub id")


def check_local_weights(section: Section, what: str) -> None:
    """Raises WeightsError where `from_pretrained` can only be a path, and that path is missing."""
    source = section.get("from_pretrained")
    if not isinstance(source, str) or "/" not in source or source.startswith(EMBEDDED):
        return
    if source.count("/") > 1 or source.endswith(SUFFIXES) or source.startswith((".", "/", "~")):
        locate(source, what=what, offline=True)
