"""The models of a server: names of `opensora models` or configuration files, as settings. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opensora.config import load_config
from opensora.config.settings import InferenceSettings
from opensora.datasets.aspect import ASPECT_RATIOS, NUM_PIXELS
from opensora.errors import ConfigError
from opensora.pipeline.request import PARTS, make_size

# Settings that a server decides for every request.
PER_SERVER: dict[str, Any] = {
    "verbose": 0, "save_dir": "./samples", "output": None, "num_sample": 1, "batch_size": 1, "allow_downloads": False,
    "llm_refine": False, "preview": False, "prompt_as_path": False, "draft": False, "steps_until": None,
}  # fmt: skip

Models = dict[str, InferenceSettings]  # name as clients give it -> settings


def load_models(names: Sequence[str]) -> Models:
    """The settings of each model. A configuration file is served under its name without folders and suffix.

    Raises ConfigError for an unknown name, and for two of the same.
    """
    models: Models = {}
    for name in names:
        config, path = load_config(name)
        config = {key: value for key, value in config.items() if key not in ("prompt", "prompt_path")}
        settings = InferenceSettings.from_config(config, path.name)
        served = Path(name).stem if Path(name).suffix == ".py" else name
        if served in models:
            raise ConfigError(f"two models are called {served!r}; rename one of the configurations")
        models[served] = dataclasses.replace(settings, **PER_SERVER, **_absolute_weights(settings))
    return models


def _absolute_weights(settings: InferenceSettings) -> dict[str, Any]:
    """The sections whose weights are on this machine, with their whole paths: workers run in another folder."""
    sections = {part: getattr(settings, part) or {} for part in PARTS}
    paths = {part: section.get("from_pretrained") for part, section in sections.items()}
    return {
        part: {**sections[part], "from_pretrained": str(Path(path).resolve())}
        for part, path in paths.items()
        if isinstance(path, str) and Path(path).exists()
    }


def described(settings: InferenceSettings) -> dict[str, Any]:
    """What clients are told of a model: the defaults of its requests, and the names that sizes may have."""
    size = make_size(settings)
    return {
        "defaults": {
            "size": f"{size.width}x{size.height}", "num_frames": size.num_frames, "fps": settings.output_fps,
            "image_size": settings.image_size, "resolution": settings.resolution,
            "aspect_ratio": settings.aspect_ratio, "seed": settings.seed,
            "num_sampling_steps": settings.section("scheduler").get("num_sampling_steps"),
            "cfg_scale": settings.section("scheduler").get("cfg_scale"),
        },
        "resolutions": list(NUM_PIXELS) if settings.resolution else [],
        "aspect_ratios": list(ASPECT_RATIOS) if settings.resolution else [],
    }  # fmt: skip
