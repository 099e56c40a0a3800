"""The models of a server: names of `opensora models` or configuration files, as settings. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opensora.config import load_config
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError

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
        models[served] = dataclasses.replace(settings, **PER_SERVER)
    return models
