"""Reads the index of a hub folder as a configuration: weights in the folder itself, settings from a list.

Layout, as diffusers has it: `model_index.json`, `transformer/`, `vae/`, `text_encoder/`, `tokenizer/`, and
`scheduler/scheduler_config.json`. The folder may come from anyone: it names no other files, servers or programs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from opensora.config.schema import Schema, check
from opensora.errors import ConfigError
from opensora.files import read_json

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
FOLDERS = {"model": "transformer", "vae": "vae", "text_encoder": "text_encoder"}  # section -> folder
WITHOUT_FOLDER = ("classes",)  # types of text encoders without weights
# Settings that a folder may state: of the frames, none of files or servers.
SETTINGS = frozenset((
    "image_size", "resolution", "aspect_ratio", "num_frames", "fps", "frame_interval", "save_fps", "multi_resolution",
    "seed", "batch_size", "dtype", "negative_prompt", "aes", "flow", "camera_motion", "align", "condition_frame_length",
))  # fmt: skip
# Keywords of sections, at any depth, that name files or say how they are fetched.
SOURCES = frozenset((
    "from_pretrained", "subfolder", "cache_dir", "local_files_only", "force_huggingface", "shardformer", "cache_table",
))  # fmt: skip


class _Stated(Schema):
    model: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    settings: dict[str, Any] = Field(default_factory=dict)


class _Index(Schema):
    model_config = ConfigDict(extra="ignore")

    opensora: _Stated


def is_hub_folder(path: Path) -> bool:
    """Whether a path is a folder with an index."""
    return (path / INDEX).is_file()


def read_hub_folder(folder: Path) -> dict[str, Any]:
    """The configuration of a hub folder. Raises ConfigError."""
    where = str(folder / INDEX)
    found = read_json(folder / INDEX, ConfigError)
    if not isinstance(found, dict) or "opensora" not in found:
        raise ConfigError(f"{where}: is no index of this program; give a folder that opensora export --to hub wrote")
    index: _Index = check(_Index, found, where, ConfigError, "export the folder again")
    stated = index.opensora
    if unknown := sorted(stated.settings.keys() - SETTINGS):
        raise ConfigError(f"{where}: a folder may not set {unknown[0][:80]!r}; remove it")
    scheduler = read_json(folder / SCHEDULER, ConfigError)
    scheduler = _checked(scheduler, str(folder / SCHEDULER))
    config = {**stated.settings, "scheduler": {key: one for key, one in scheduler.items() if key != "_class_name"}}
    for part, below in FOLDERS.items():
        section = config[part] = _checked(getattr(stated, part), f"{where}: {part}")
        if part == "text_encoder" and section.get("type") in WITHOUT_FOLDER:
            continue
        if not (folder / below).is_dir():
            raise ConfigError(f"{folder}: lacks the folder {below}; copy it again")
        section |= {"from_pretrained": str(folder), "subfolder": below}
    return config


def _checked(section: Any, where: str) -> dict[str, Any]:
    """A copy of a section that names no files. Raises ConfigError."""
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: must be a JSON object; export the folder again")
    level: list[Any] = [section]
    while level:  # its depth has been bounded
        objects = [one for one in level if isinstance(one, dict)]
        if named := sorted(SOURCES & set().union(*objects)):
            raise ConfigError(f"{where}: a folder may not set {named[0]!r}, since its weights are inside; remove it")
        below = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
        level = [item for item in below if isinstance(item, dict | list)]
    return dict(section)
