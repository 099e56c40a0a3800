"""The shipped configuration files say what the newest version that has them recorded; older files still read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from opensora.config import find_config, read_config
from opensora.config.settings import InferenceSettings, TrainSettings
from opensora.pipeline.prompts import load_prompts
from opensora.pipeline.request import make_requests
from tests.parity.cases import ROOT

VERSIONS = ("v1.2.0", "v1.1.0", "v1.0.0")  # newest first
RECORDED = json.loads((ROOT / "data" / "config_files.json").read_text())
NEWEST = {path: RECORDED[version][path] for version in reversed(VERSIONS) for path in RECORDED[version]}
OLDER = [(version, path) for version in VERSIONS[1:] for path in RECORDED[version]]
REPOSITORY = Path(__file__).parents[2]
OURS = ("_base_", "embedded")  # folders of configs/ without a counterpart

# Paths of the authors' machines, and what takes their place.
LOCAL_PATHS = {
    "<local path>/vae-pipeline": "hpcai-tech/OpenSora-VAE-v1.2",
    "pretrained_models/vae-pipeline": "hpcai-tech/OpenSora-VAE-v1.2",
    "<local path>/1091-STDiT3-XL-2/epoch0-global_step8500": "hpcai-tech/OpenSora-STDiT-v3",
    "<local path>.csv": None,  # a table is named by --data-path, as in every other file
}
# Clips on other people's servers, and those that are shipped in their place.
SHIPPED = {
    "https://cdn.openai.com/tmp/s/interp/d0.mp4": "assets/videos/condition/drive.mp4",
    "https://cdn.pixabay.com/video/2021/04/25/72171-542991404_large.mp4": "assets/videos/condition/forest.mp4",
}
# What newer versions decided anew. Any other difference to an older file would be a spelling that is not understood.
DECIDED_ANEW = {
    "batch_size", "dataset.data_path", "dataset.frame_interval", "dataset.image_size", "dataset.num_frames", "dtype",
    "grad_checkpoint", "mask_strategy", "model.qk_norm_legacy", "num_workers", "plugin", "prompt", "prompt_path",
    "reference_path", "save_dir", "scheduler.cfg_channel", "text_encoder.from_pretrained", "vae.micro_batch_size",
    "dataset.transform_name",  # "center" is the only one of 1.0
}  # fmt: skip


def localised(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: localised(item) for key, item in value.items()}
    if isinstance(value, list):
        return [localised(item) for item in value]
    for recorded, ours in SHIPPED.items() if isinstance(value, str) else ():
        value = value.replace(recorded, ours)
    return LOCAL_PATHS.get(value, value) if isinstance(value, str) else value


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def settings_of(path: str, config: dict[str, Any]) -> InferenceSettings | TrainSettings:
    kind = InferenceSettings if "/inference/" in path else TrainSettings
    return kind.from_config(config, path)


def differing(one: Any, other: Any, path: str = "") -> set[str]:
    """The dotted keys whose values differ, in one or both."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {
            name
            for key in one.keys() | other.keys()
            for name in differing(one.get(key), other.get(key), f"{path}.{key}" if path else key)
        }
    return set() if one == other else {path}


def test_every_file_is_there_and_no_other():
    assert set(RECORDED) == set(VERSIONS)
    shipped = [file.relative_to(REPOSITORY) for file in (REPOSITORY / "configs").rglob("*.py")]
    assert {file.as_posix() for file in shipped if file.parts[1] not in OURS} == set(NEWEST)


@pytest.mark.parametrize("path", NEWEST)
def test_content(path: str):
    config = read_config(find_config(path))
    assert plain(config) == localised(NEWEST[path])
    settings_of(path, config)


@pytest.mark.parametrize("path", NEWEST)
def test_tuples_and_whole_number_keys(path: str):
    config = read_config(find_config(path))
    assert isinstance(config.get("image_size", ()), tuple)
    assert isinstance((config.get("dataset") or {}).get("image_size", ()), tuple)
    for entries in config.get("bucket_config", {}).values():
        for num_frames, entry in entries.items():
            assert isinstance(num_frames, int) and isinstance(entry, tuple)
            assert not any(isinstance(part, list) for part in entry)


@pytest.mark.parametrize(("version", "path"), OLDER)
def test_older_file_is_understood(version: str, path: str):
    """Its settings are those of the shipped file, but for what newer versions decided anew."""
    old = settings_of(path, RECORDED[version][path])
    new = settings_of(path, read_config(find_config(path)))
    assert differing(plain(dataclasses.asdict(old)), plain(dataclasses.asdict(new))) <= DECIDED_ANEW


def test_nothing_is_listed_needlessly():
    found = set()
    for version, path in OLDER:
        old, new = settings_of(path, RECORDED[version][path]), settings_of(path, read_config(find_config(path)))
        found |= differing(plain(dataclasses.asdict(old)), plain(dataclasses.asdict(new)))
    assert found == DECIDED_ANEW
    named = {**LOCAL_PATHS, **SHIPPED}
    assert {text for text in named if text in json.dumps(NEWEST)} == set(named)


NAME_PROMPTS = sorted({config["prompt_path"] for config in NEWEST.values() if config.get("prompt_path")})


@pytest.mark.parametrize("name", NAME_PROMPTS)
def test_prompt_file(name: str):
    prompts = load_prompts(REPOSITORY / name)
    assert prompts and all(prompts) and len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("path", [path for path, config in NEWEST.items() if config.get("prompt_path")])
def test_prompts_can_be_used(path: str, monkeypatch: pytest.MonkeyPatch):
    """From the root of the repository, without another flag; class numbers lie among the classes."""
    monkeypatch.chdir(REPOSITORY)
    config = read_config(path)
    if config["text_encoder"]["type"] == "classes":
        numbers = [int(prompt) for prompt in load_prompts(config["prompt_path"])]
        assert 0 <= min(numbers) <= max(numbers) < config["text_encoder"]["num_classes"]
    else:
        assert make_requests(settings_of(path, config))
