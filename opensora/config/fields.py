"""Settings as dataclasses: each field declares its default, bounds, flag and documentation."""

from __future__ import annotations

import dataclasses
import logging
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from opensora.config import sections
from opensora.config.legacy import OF_NO_EFFECT, upgrade
from opensora.config.schema import Int, Number, Schema, Text, check, shown
from opensora.errors import ConfigError, did_you_mean

logger = logging.getLogger("opensora")
Settings = TypeVar("Settings", bound="SettingsBase")


def _as_list(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("described", "a list of strings")
    return list(value)


TextList = Annotated[list[Text], Field(max_length=100_000), BeforeValidator(_as_list)]
SECTIONS = ("model", "vae", "text_encoder", "scheduler", "dataset", "discriminator", "restorer")
DEFAULT_MAXIMUM: dict[Any, float] = {int: 2**63 - 1, float: 1e12}


def setting(
    default: Any = MISSING, help: str = "", *, minimum: float | None = None, maximum: float | None = None,
    nargs: Any = None, schema: Any = None, doc: str = "", example: Any = None,
) -> Any:  # fmt: skip
    """A dataclass field, required if it has no default; a number lies between `minimum` and `maximum`.

    `help` adds a command line flag of the first annotated type; `nargs=0` makes it a switch. Values are validated
    against `schema`, or else the annotation. docs/config.md shows `help` or `doc`, and `example` or the default.
    """
    metadata = {
        "help": help, "minimum": minimum, "maximum": maximum, "nargs": nargs, "schema": schema, "doc": doc,
        "example": example,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def one_of(*names: str) -> Any:
    """The type of a text that is one of `names`."""
    return Literal[names]


@lru_cache
def field_types(settings: Any) -> dict[str, Any]:
    """Field name of a settings class -> the type that its value is validated against."""
    hints = typing.get_type_hints(settings, include_extras=True)
    return {field.name: _field_type(hints[field.name], field.metadata) for field in dataclasses.fields(settings)}


def _field_type(hint: Any, metadata: Any) -> Any:
    if metadata.get("schema") is not None:
        return metadata["schema"] | None if _allows_none(hint) else metadata["schema"]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.Union[tuple(_field_type(one, metadata) for one in typing.get_args(hint))]  # noqa: UP007
    if hint in DEFAULT_MAXIMUM:
        minimum, maximum = metadata.get("minimum"), metadata.get("maximum")
        maximum = DEFAULT_MAXIMUM[hint] if maximum is None else maximum
        return Annotated[{int: Int, float: Number}[hint], Field(ge=minimum, le=maximum)]
    return {str: Text, Sequence[str]: TextList}.get(hint, hint)


def _allows_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


@dataclass(frozen=True)
class SettingsBase:
    """Base of the frozen settings dataclasses. Construction raises ConfigError for an invalid value."""

    without_effect: ClassVar[tuple[str, ...]] = ()  # fields that this kind of run ignores

    def __post_init__(self) -> None:
        settings: Any = type(self)  # mypy takes classes for unhashable
        for name, kind in field_types(settings).items():
            value = check(kind, getattr(self, name), key=name)
            if name in SECTIONS and value is not None:
                value = _section(name, value)
            object.__setattr__(self, name, value.model_dump() if isinstance(value, Schema) else value)

    @classmethod
    def from_config(cls: type[Settings], config: dict[str, Any], source: str) -> Settings:
        """Settings from a configuration dict. Every ConfigError begins with `source`, the file."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        try:
            config = upgrade(config)
        except RecursionError:
            raise ConfigError(f"{source}: is nested too deep") from None
        cls._warn_of_ignored(config, source)
        config = {n: value for n, value in config.items() if n in fields or n not in OF_NO_EFFECT}
        try:
            for name in config:
                if name not in fields:
                    raise ConfigError(f"unknown setting {shown(name)}{did_you_mean(name, fields)}")
            for name, field in fields.items():
                if field.default is MISSING and config.get(name) is None:
                    raise ConfigError(f"setting '{name}' is missing")
            for name, table in sections.SECTIONS.items():
                if isinstance(config.get(name), dict) and "type" in config[name]:
                    sections.check_type(name, config[name]["type"], table)
            return cls(**{name: _shaped(value, str(fields[name].type)) for name, value in config.items()})
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error

    @classmethod
    def _warn_of_ignored(cls, config: dict[str, Any], source: str) -> None:
        """Warns of settings that have a value and no effect."""
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        unread = {name: value for name, value in OF_NO_EFFECT.items() if name not in fields}
        unread |= {name: fields[name] for name in cls.without_effect if name in fields}
        ignored = [name for name, value in config.items() if name in unread and value not in (None, unread[name])]
        if ignored:
            logger.warning("%s: no effect here: %s", source, ", ".join(ignored))


def _section(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """Validates a section of a known type; an unknown type is refused when the section is built."""
    if not isinstance(value.get("type"), str):
        raise ConfigError(f"{name} needs a type, like {name} = dict(type='...')")
    return sections.checked(value, name) if value["type"] in sections.TYPES else value


def _shaped(value: Any, annotation: str) -> Any:
    """Converts a list to an annotated tuple; a string, or a list with None entries, to a list of strings."""
    if annotation.startswith("tuple") and isinstance(value, list):
        return tuple(value)
    if annotation.startswith("Sequence") and isinstance(value, str | list | tuple):
        return ["" if text is None else text for text in ([value] if isinstance(value, str) else value)]
    return value
