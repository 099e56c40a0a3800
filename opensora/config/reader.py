"""Reads configuration files as data: MMEngine-style `.py`, `.json` and `.yaml`.

A file may inherit from others (`_base_`). Names that start with `_` are private to the file. A `Budget` bounds the
whole read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from opensora.config.budget import MAX_BASES_DEPTH, MAX_FILES, Budget
from opensora.config.evaluator import Evaluator
from opensora.config.placeholders import expand_placeholders
from opensora.config.schema import FilePath, check
from opensora.errors import ConfigError
from opensora.files import error_message, parse_json

MAX_YAML_BYTES = 100_000
_Bases = FilePath | Annotated[list[FilePath], Field(max_length=MAX_FILES)]


def read_config(path: str | Path, trust: bool = False) -> dict[str, Any]:
    """The settings of a configuration file as nested dicts, merged over those of its `_base_` files.

    With `trust`, mmengine-lite executes the file instead. Raises ConfigError with file and line.
    """
    return _run(path) if trust else _read(Path(path), Budget(), ())


def merge_configs(base: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """Merges `child` over `base` recursively; a child dict with `_delete_=True` replaces the inherited one."""
    merged = {} if child.get("_delete_") else dict(base)
    for key, value in child.items():
        if isinstance(value, dict):
            below = merged.get(key)
            value = merge_configs(below if isinstance(below, dict) else {}, value)
        if key != "_delete_":
            merged[key] = value
    return merged


def _run(path: str | Path) -> dict[str, Any]:
    try:
        from mmengine.config import Config
    except ImportError as error:
        raise ConfigError("--trust-config needs mmengine-lite; pip install 'opensora[mmengine]'") from error
    try:
        return Config.fromfile(str(path)).to_dict()
    except (Exception, SystemExit) as error:  # a program raises anything
        reason = f"{type(error).__name__}: {error_message(error)}" if str(error) else type(error).__name__
        raise ConfigError(f"{path}: failed when it was run as a program ({reason})") from error


def _read(path: Path, budget: Budget, parents: tuple[Path, ...]) -> dict[str, Any]:
    here = path.resolve()
    if here in parents:
        raise ConfigError(f"{path}: _base_ leads back to itself through {' -> '.join(p.name for p in parents)}")
    if len(parents) == MAX_BASES_DEPTH:
        raise ConfigError(f"{path}: _base_ leads through more than {MAX_BASES_DEPTH} files, one after the other")
    names = _names(path, budget)
    bases = names.pop("_base_", [])
    bases = check(_Bases, list(bases) if isinstance(bases, tuple) else bases, str(path), key="_base_")
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = merge_configs(merged, _read(path.parent / base, budget, (*parents, here)))
    return merge_configs(merged, {name: value for name, value in names.items() if not name.startswith("_")})


def _names(path: Path, budget: Budget) -> dict[str, Any]:
    """What one file assigns."""
    suffix = path.suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        return Evaluator(path, budget.read(path), budget).names
    if suffix == ".json":
        values = parse_json(budget.read(path), str(path), ConfigError)
    else:
        values = _parse_yaml(budget.read(path, MAX_YAML_BYTES), path)
    budget.count(values, str(path))
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f'{path}: must map names to values, such as {{"num_frames": 17}}')
    return _filled(values, path)


def _parse_yaml(text: str, path: Path) -> Any:
    """The value of a YAML text, of the types of JSON alone."""
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(f"{path}: YAML needs PyYAML (pip install pyyaml); or write it as .py or .json") from error

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few of them can stand for any number of values
                raise yaml.YAMLError("aliases are not read")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise ConfigError(f"{path}: cannot be read as YAML (nested too deep)") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error_message(error)})") from None


def _filled(value: Any, path: Path) -> Any:
    """`value` with the placeholders in its texts replaced."""
    if isinstance(value, str):
        try:
            return expand_placeholders(value, path)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
    if isinstance(value, dict):
        return {_filled(key, path): _filled(item, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, path) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ConfigError(f"{path}: a value of type {type(value).__name__} is not allowed in a configuration")
