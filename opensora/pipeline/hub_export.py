"""Writes a hub folder: the models of a configuration with their index and a model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora import __version__
from opensora.checkpoints import builder
from opensora.checkpoints.eight_bits import stored
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.save import save_pretrained
from opensora.checkpoints.sections import check_section
from opensora.checkpoints.summary import Summary, summarize
from opensora.checkpoints.tokenizer import tokenizer_files
from opensora.config.hub_folder import FOLDERS, INDEX, SCHEDULER, SETTINGS, SOURCES
from opensora.errors import ConfigError, WeightsError
from opensora.pipeline.model_card import CardFacts, model_card


def export_hub_folder(
    config: Mapping[str, Any], destination: Path, facts: CardFacts, offline: bool = False
) -> dict[str, Summary]:
    """Writes the models that a configuration names into a new folder, whole or not at all; section -> its summary.

    Weights are written as they are, packed blocks of GGUF unpacked. Raises ConfigError and WeightsError.
    """
    if destination.exists():
        raise ConfigError(f"{destination} exists; choose another folder")
    for part in FOLDERS:
        if not isinstance(config.get(part), dict):
            raise ConfigError(f"the configuration has no {part}, which a hub folder needs")
        check_section(config[part], part)
    unfinished = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        summaries = {part: summary for part in FOLDERS if (summary := _write_part(config, part, unfinished, offline))}
        _write_json(unfinished / SCHEDULER, _scheduler(config))
        _write_json(unfinished / INDEX, _index(config))
        card = model_card(destination.name, config, summaries, facts, unfinished)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        unfinished.rename(destination)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return {part: summary._replace(path=destination / FOLDERS[part]) for part, summary in summaries.items()}


def _write_part(config: Mapping[str, Any], part: str, folder: Path, offline: bool) -> Summary | None:
    path = builder.find_weights(config[part], part, offline)
    if path is None:  # class labels
        return None
    stated = builder.config_json(path)
    if not stated:
        remedy = "write it as a folder first, with opensora convert --to hf --config"
        raise WeightsError(f"{path}: has no config.json, which a hub folder needs; {remedy}")
    tensors = read_state_dict(path)
    save_pretrained(stored(tensors), folder / FOLDERS[part], stated)
    if part == "text_encoder":
        (folder / "tokenizer").mkdir()
        for file in tokenizer_files(builder.tokenizer_folder(path)):
            shutil.copyfile(file, folder / "tokenizer" / file.name)
    return summarize(folder / FOLDERS[part], tensors)


def _index(config: Mapping[str, Any]) -> dict[str, Any]:
    components = {folder: ["opensora", config[part]["type"]] for part, folder in FOLDERS.items()}
    components |= {"tokenizer": ["opensora", config["text_encoder"]["type"]]}
    components |= {"scheduler": ["opensora", _scheduler(config)["_class_name"]]}
    stated = {part: {key: one for key, one in config[part].items() if key not in SOURCES} for part in FOLDERS}
    settings = {key: config[key] for key in sorted(SETTINGS & config.keys())}
    version = {"_class_name": "VideoPipeline", "_opensora_version": __version__}
    return {**version, **components, "opensora": {**stated, "settings": settings}}


def _scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    section = config.get("scheduler")
    if not isinstance(section, dict) or not isinstance(section.get("type"), str):
        raise ConfigError("the configuration has no scheduler = dict(type=...), which a hub folder needs")
    return {"_class_name": section["type"], **{key: one for key, one in section.items() if key not in SOURCES}}


def _write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
