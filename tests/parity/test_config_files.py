"""The shipped configuration files say what the recorded ones of v1.2.0 say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from opensora.config import find_config, read_config
from opensora.settings import InferenceSettings, TrainSettings
from tests.parity.cases import ROOT

RECORDED = json.loads((ROOT / "data" / "config_files.json").read_text())
FAMILIES_HERE = ("opensora-v1-2", "vae")
FAMILIES_LATER = ("opensora", "opensora-v1-1", "dit", "latte", "pixart")
VERSIONS_LATER = {"v1.1.0", "v1.0.0"}
HERE = [path for path in RECORDED["v1.2.0"] if path.split("/")[1] in FAMILIES_HERE]

# Paths of the authors' machines, and the relative path that takes their place.
LOCAL_PATHS = {
    "<local path>/vae-pipeline": "pretrained_models/vae-pipeline",
    "<local path>/1091-STDiT3-XL-2/epoch0-global_step8500": "outputs/1091-STDiT3-XL-2/epoch0-global_step8500",
}


def localised(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: localised(item) for key, item in value.items()}
    return LOCAL_PATHS.get(value, value) if isinstance(value, str) else value


def test_every_file_belongs_to_a_known_family():
    assert set(RECORDED) == {"v1.2.0"} | VERSIONS_LATER
    assert {path.split("/")[1] for path in RECORDED["v1.2.0"]} == {*FAMILIES_HERE, *FAMILIES_LATER}
    assert HERE


@pytest.mark.parametrize("path", HERE)
def test_content(path: str):
    assert json.loads(json.dumps(read_config(find_config(path)))) == localised(RECORDED["v1.2.0"][path])


@pytest.mark.parametrize("path", HERE)
def test_tuples_and_whole_number_keys(path: str):
    config = read_config(find_config(path))
    assert isinstance(config.get("image_size", ()), tuple)
    for entries in config.get("bucket_config", {}).values():
        for num_frames, entry in entries.items():
            assert isinstance(num_frames, int) and isinstance(entry, tuple)
            assert not isinstance(entry[0], list)


@pytest.mark.parametrize("path", [path for version in RECORDED.values() for path in version])
def test_settings_accept_the_file(path: str):
    kind = InferenceSettings if "/inference/" in path else TrainSettings
    for version in RECORDED.values():
        if path in version:
            kind.from_config(version[path], path)
