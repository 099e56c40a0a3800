"""docs/config.md says what the declarations say, and explains every field that a shipped configuration has."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from opensora.config import document, find_config, read_config
from opensora.config.fields import field_types
from opensora.config.legacy import LEGACY, OF_NO_EFFECT
from opensora.config.schema import check
from opensora.config.settings import ExtractSettings, InferenceSettings, SearchSettings, TrainSettings

TEXT = document.DOCUMENT.read_text(encoding="utf-8")
ROOT = document.DOCUMENT.parents[1]
EXPLAINED = {name.rpartition(".")[2] for name in re.findall(r"^\| `([\w.]+)` \|", TEXT, re.M)}
SETTINGS = (InferenceSettings, TrainSettings, SearchSettings, ExtractSettings)
FIELDS = {f"{kind.__name__}.{field.name}": (kind, field) for kind in SETTINGS for field in dataclasses.fields(kind)}
CONFIGS = sorted(find_config("embedded").parents[2].rglob("*.py"))


def test_it_is_what_the_declarations_say():
    assert document.document() == TEXT, "run python -m opensora.config.document"


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_a_meaning_and_an_example(name):
    kind, field = FIELDS[name]
    if name == "ExtractSettings.model":
        return  # of training; here it may be left out
    assert field.metadata["help"] or field.metadata["doc"]
    example = field.default if field.metadata["example"] is None else field.metadata["example"]
    assert example is not None and example is not dataclasses.MISSING
    check(field_types(kind)[field.name], example)
    assert field.name in EXPLAINED


def keys(config: dict[str, Any]) -> set[str]:
    """The names of a configuration and the keywords of its sections."""
    found = set(config)
    for name, value in config.items():
        if isinstance(value, dict) and name not in ("bucket_config", "mask_ratios"):
            found |= keys(value)
    return found - {"type"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_field_of_the_shipped_configurations_is_explained(path):
    older = {name.rpartition(".")[2] for name in LEGACY} | OF_NO_EFFECT.keys()
    assert keys(read_config(path)) <= EXPLAINED | older
    assert all(f"`{name}`" in TEXT for name in OF_NO_EFFECT)


@pytest.mark.parametrize("name", ["README.md", "docs/structure.md"])
def test_it_is_linked(name):
    assert "config.md)" in (ROOT / name).read_text(encoding="utf-8")


def test_the_words_for_types():
    assert document.type_text(int) == "int"
    assert document.type_text(bool | None) == "bool or None"
    assert document.type_text(int | float) == "float"
    assert "int in [1, 10000]" in TEXT and "float in (0, 1000000]" in TEXT and "(height, width) in pixels" in TEXT
