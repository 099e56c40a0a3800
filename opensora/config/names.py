"""Resolves the name of a configuration: a file, a name below configs/, a model of `opensora models`, a hub folder."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from opensora.config import model_zoo
from opensora.config.hub_folder import INDEX, is_hub_folder, read_hub_folder
from opensora.config.reader import read_config
from opensora.config.schema import FilePath, check
from opensora.errors import ConfigError

MODELS = {entry.name: entry.config for entry in model_zoo.MODELS}


def find_config(name: str | Path) -> Path:
    """The configuration file of a path, a name below `configs/` (with or without `.py`), or a model name.

    That of a hub folder is its index.
    Raises ConfigError with the nearest name.
    """
    given: str = check(FilePath, name, key="the name of a configuration")
    wanted = given.replace("\\", "/").removeprefix("./").removeprefix("configs/")
    folder = _folder()
    model = MODELS.get(wanted, wanted)
    for candidate in (Path(given), folder / model, folder / f"{model}.py"):
        if candidate.is_file():
            return candidate
    if is_hub_folder(Path(given)):
        return Path(given, INDEX)
    if Path(given).exists() and not (folder / wanted).is_dir():
        kind = "a folder" if Path(given).is_dir() else "not a regular file"
        raise ConfigError(f"configuration '{given}' is {kind}; give a file")
    known = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.py"))
    near = _nearest(wanted, [name for name in known if not name.startswith("_")])
    raise ConfigError(f"configuration '{given}' does not exist{f'; did you mean {near!r}?' if near else ''}")


def load_config(name: str | Path, trust: bool = False) -> tuple[dict[str, Any], Path]:
    """The settings of a named configuration, and its file. Raises ConfigError.

    For a model name without a configuration of its own, the model section is reduced to that `type`, without weights.
    """
    path = find_config(name)
    config = read_hub_folder(path.parent) if path.name == INDEX else read_config(path, trust)
    section = config.get("model")
    if str(name) in MODELS and "/" in str(name) and isinstance(section, dict) and section.get("type") != str(name):
        config["model"] = {"type": str(name)}
    return config, path


def _folder() -> Path:
    package = Path(__file__).parents[1]
    packaged = (package / "configs").is_dir()  # an installed wheel brings them along; else they lie in the repository
    return (package if packaged else package.parent) / "configs"


def _nearest(wanted: str, files: Sequence[str]) -> str | None:
    """The most likely name for a mistyped one; for a folder, its first inference configuration."""
    names = {name.lower(): name for name in (*files, *(file.removesuffix(".py") for file in files), *MODELS)}
    folders = {name.split("/")[0].lower() for name in files}
    lower = wanted.lower().rstrip("/")
    if "/" not in lower and (folder := get_close_matches(lower, folders, 1, 0.8)):
        below = sorted(files, key=lambda name: ("/inference/" not in name, "/sample." not in name, name))
        lower = next(name for name in below if name.lower().startswith(f"{folder[0]}/")).lower()
        return "embedded" if folder[0] == "embedded" else names[lower]
    near = get_close_matches(lower, names, 1, 0.5)
    return names[near[0]] if near else None
