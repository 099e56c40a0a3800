"""Settings as dataclasses whose fields declare default, flag, bounds and meaning, and the check that these make."""

from __future__ import annotations

import dataclasses
import logging
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from opensora.config import sections
from opensora.config.legacy import OF_NO_EFFECT, modernised
from opensora.config.schema import Int, Number, Schema, Text, check, shown
from opensora.errors import ConfigError, did_you_mean

logger = logging.getLogger("opensora")
Settings = TypeVar("Settings", bound="Checked")


def _as_list(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("worded", "a list of texts")
    return list(value)


Texts = Annotated[list[Text], Field(max_length=100_000), BeforeValidator(_as_list)]
SECTIONS = ("model", "vae", "text_encoder", "scheduler", "dataset", "discriminator")
MOST = {int: 2**63 - 1, float: 1e12}  # where a field has no bound of its own


def setting(
    default: Any = MISSING, help: str = "", *, least: float | None = None, most: float | None = None,
    nargs: Any = None, kind: Any = None, about: str = "", example: Any = None,
) -> Any:  # fmt: skip
    """A dataclass field, required without a default; its number must be `least` to `most`.

    `help` gives it a command line flag, whose values are of the first kind annotated; `nargs` 0 makes that a switch.
    `kind` is what its values are checked against, else the annotation is. The document says `about` where there is no
    `help`, and `example` where the default shows nothing.
    """
    metadata = {
        "help": help, "least": least, "most": most, "nargs": nargs, "kind": kind, "about": about, "example": example,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def one_of(*names: str) -> Any:
    """The kind of a text that is one of `names`."""
    return Literal[names]


@lru_cache
def kinds(settings: type) -> dict[str, Any]:
    """Field -> what its value is checked against."""
    hints = typing.get_type_hints(settings, include_extras=True)
    return {field.name: _kind(hints[field.name], field.metadata) for field in dataclasses.fields(settings)}


def _kind(hint: Any, metadata: Any) -> Any:
    if metadata.get("kind") is not None:
        return metadata["kind"] | None if _takes_none(hint) else metadata["kind"]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.Union[tuple(_kind(one, metadata) for one in typing.get_args(hint))]  # noqa: UP007
    if hint in MOST:
        least, most = metadata.get("least"), metadata.get("most")
        return Annotated[{int: Int, float: Number}[hint], Field(ge=least, le=MOST[hint] if most is None else most)]
    return {str: Text, Sequence[str]: Texts}.get(hint, hint)


def _takes_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


class Checked:
    """A frozen dataclass of settings; a wrong value raises ConfigError on construction."""

    without_effect: ClassVar[tuple[str, ...]] = ()  # fields that this kind of run does not read

    def __post_init__(self) -> None:
        for name, kind in kinds(type(self)).items():
            value = check(kind, getattr(self, name), key=name)
            if name in SECTIONS and value is not None:
                value = _section(name, value)
            object.__setattr__(self, name, value.model_dump() if isinstance(value, Schema) else value)

    @classmethod
    def from_config(cls: type[Settings], config: dict[str, Any], source: str) -> Settings:
        """The settings of a configuration dict; `source` (its file) opens every ConfigError."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        try:
            config = modernised(config)
        except RecursionError:
            raise ConfigError(f"{source}: is nested too deep") from None
        cls._tell_what_is_dropped(config, source)
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
            return cls(**{name: _shaped(value, fields[name].type) for name, value in config.items()})
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error

    @classmethod
    def _tell_what_is_dropped(cls, config: dict[str, Any], source: str) -> None:
        """Warns of settings that ask for something and have no effect."""
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        unread = {name: value for name, value in OF_NO_EFFECT.items() if name not in fields}
        unread |= {name: fields[name] for name in cls.without_effect if name in fields}
        dropped = [name for name, value in config.items() if name in unread and value not in (None, unread[name])]
        if dropped:
            logger.warning("%s: no effect here: %s", source, ", ".join(dropped))


def _section(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """A section of a known type, checked; one of another type is refused where it is built."""
    if not isinstance(value.get("type"), str):
        raise ConfigError(f"{name} needs a type, like {name} = dict(type='...')")
    return sections.checked(value, name) if value["type"] in sections.TYPES else value


def _shaped(value: Any, annotation: str) -> Any:
    """A tuple of a list where one is annotated; a list of texts of one text, or of one with None for empty texts."""
    if annotation.startswith("tuple") and isinstance(value, list):
        return tuple(value)
    if annotation.startswith("Sequence") and isinstance(value, str | list | tuple):
        return ["" if text is None else text for text in ([value] if isinstance(value, str) else value)]
    return value
