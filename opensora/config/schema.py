"""Values from outside (files, flags, JSON), checked against declared types; a mistake becomes one line.

A schema is a class of typed fields; a wrong type, a value out of range or an unknown key raises an error that names it.
Validation is strict: `"3"` is not a number, `True` is not a count. Integers may be written `3.0`, tuples as lists.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, TypeVar, overload

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from opensora.errors import ConfigError, OpenSoraError, did_you_mean, printable

MAX_SHOWN = 80  # characters of a value in a message
MAX_TEXT = 100_000  # characters of any text from a file or flag
MAX_PATH = 4096  # characters of a path
T = TypeVar("T")


def _as_whole(value: Any) -> Any:
    """Converts 3.0 to 3."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _keep_int(value: Any, handler: Any) -> Any:
    """Keeps an int an int: 4 does not become 4.0."""
    checked = handler(value)
    return value if type(value) is int else checked


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("described", "a string without NUL")
    return text


def _as_path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _openable(path: str) -> str:
    """Rejects a path with a component that is too long for a file system."""
    if any(len(part.encode()) > 255 for part in path.split("/")):
        raise PydanticCustomError("described", "a path whose parts are at most 255 bytes long")
    return path


@dataclass(frozen=True)
class Described:
    """Validator of an annotation: any error below reads `must be {description}`."""

    description: str  # docs/config.md shows it

    def __call__(self, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValueError:
            raise PydanticCustomError("described", self.description) from None


def described_as(description: str) -> WrapValidator:
    """Annotation: any validation error below reads `must be {description}`."""
    return WrapValidator(Described(description))


Int = Annotated[int, BeforeValidator(_as_whole), Field(ge=-(2**63), lt=2**63)]
Count = Annotated[Int, Field(ge=0)]  # >= 0
Positive = Annotated[Int, Field(ge=1)]  # >= 1
Number = Annotated[float, Field(allow_inf_nan=False), WrapValidator(_keep_int)]  # an int stays an int
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Text = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_without_nul)]
Name = Annotated[str, Field(max_length=1024), AfterValidator(_without_nul)]
FilePath = Annotated[
    str, Field(max_length=MAX_PATH), AfterValidator(_without_nul), AfterValidator(_openable), BeforeValidator(_as_path)
]
as_tuple = BeforeValidator(_as_tuple)  # annotation of a tuple: accepts a list
Pair = Annotated[tuple[T, T], as_tuple]
Triple = Annotated[tuple[T, T, T], as_tuple]
Many = Annotated[tuple[T, ...], as_tuple]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Schema(BaseModel):
    """Typed fields of a mapping. Frozen; unknown keys raise an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


@overload
def check(
    kind: type[T], value: Any, where: str = "", error: type[OpenSoraError] = ConfigError, remedy: str = "",
    key: str = "",
) -> T: ...  # fmt: skip
@overload
def check(
    kind: Any, value: Any, where: str = "", error: type[OpenSoraError] = ConfigError, remedy: str = "", key: str = ""
) -> Any: ...
def check(
    kind: Any, value: Any, where: str = "", error: type[OpenSoraError] = ConfigError, remedy: str = "", key: str = ""
) -> Any:
    """Validates `value` against `kind`, a `Schema` or any annotation, and returns it with ints and tuples normalized.

    Raises `error` with one line: `where`, the key (prefixed with `key`, the name of `value`), what is expected, what
    was found, and `remedy`.
    """
    try:
        return adapter(kind).validate_python(value)
    except RecursionError:
        problem = f"{key} is nested too deep".lstrip()
    except ValidationError as failure:
        problem = explain(failure, kind, value, key)
    raise error("".join((f"{where}: " if where else "", problem, f"; {remedy}" if remedy else "")))


@lru_cache(256)
def adapter(kind: Any) -> TypeAdapter:
    """The validator of a type."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return TypeAdapter(kind)
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def explain(failure: ValidationError, kind: Any, value: Any, root: str = "") -> str:
    """One line for a failed validation of `value`: `key must be ...; it is ...`; `root` is the name of `value`."""
    mistakes = failure.errors(include_url=False, include_context=True)
    mistakes.sort(key=lambda one: -len(_keys(one["loc"], value)))  # the closest alternative of a union first
    first = next((one for one in mistakes if one["type"] == "extra_forbidden"), mistakes[0])  # often a misspelt key
    above = (root,) if root else ()
    key = _dotted((*above, *_keys(first["loc"], value)))
    match first["type"]:
        case "extra_forbidden":
            nearest = did_you_mean(str(first["loc"][-1]), _known(kind, first["loc"]))
            return f"unknown setting '{key}'{nearest}"
        case "invalid_key":
            return f"the key {shown(first['loc'][-1])} must be a string"
        case "missing" if isinstance(first["loc"][-1], int):
            place = _dotted((*above, *_keys(first["loc"][:-1], value)))
            return f"{place} must be at least {first['loc'][-1] + 1} long; it is {shown(first['input'])}"
        case "missing":
            return f"setting '{_dotted((*above, *_keys(first['loc'][:-1], value), first['loc'][-1]))}' is missing"
        case "value_error":
            return f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
        case "literal_error":
            choices = first["ctx"]["expected"].replace(" or ", ", ").replace("'", "")
            near = did_you_mean(first["input"], choices.split(", ")) if isinstance(first["input"], str) else ""
            return f"{key or 'the value'} {shown(first['input'])} is not known{near or ';'} choose one of {choices}"
    same = [one for one in mistakes if _keys(one["loc"], value) == _keys(first["loc"], value)]
    same = [one for one in same if not one["type"].endswith("_type")] or same  # prefer errors other than a wrong type
    expected = list(dict.fromkeys(_expected(one) for one in same))
    return f"{key or 'the value'} must be {' or '.join(expected)}; it is {shown(same[0]['input'])}"


def shown(value: Any) -> str:
    """The repr of a value, truncated to one short line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # huge integers, deep nesting
        text = f"a very large {type(value).__name__}"
    text = " ".join(text[: 2 * MAX_SHOWN].splitlines())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


_EXPECTED = {
    "int_type": "an integer", "int_from_float": "an integer", "int_parsing_size": "a smaller number",
    "float_type": "a number", "finite_number": "a finite number", "bool_type": "True or False",
    "string_type": "a string", "string_unicode": "UTF-8 text", "none_required": "None", "dict_type": "a dict",
    "model_type": "a dict", "mapping_type": "a dict", "list_type": "a list",
    "tuple_type": "a tuple", "bytes_type": "bytes",
}  # fmt: skip
_WITH_CONTEXT = {
    "greater_than_equal": "at least {ge}", "greater_than": "above {gt}", "less_than_equal": "at most {le}",
    "less_than": "below {lt}", "string_too_long": "at most {max_length} characters long",
    "string_too_short": "at least {min_length} characters long", "too_long": "at most {max_length} long",
    "too_short": "at least {min_length} long", "multiple_of": "a multiple of {multiple_of}",
    "string_pattern_mismatch": "of the form {pattern}",
}  # fmt: skip


def _expected(mistake: Mapping[str, Any]) -> str:
    kind, context = mistake["type"], mistake.get("ctx", {})
    if kind == "described":
        return mistake["msg"]
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _WITH_CONTEXT:
        whole = {name: int(n) if isinstance(n, float) and n.is_integer() else n for name, n in context.items()}
        return _WITH_CONTEXT[kind].format(**whole)
    return mistake["msg"].removeprefix("Input should be ").removeprefix("Value error, ")


def _keys(location: Sequence[int | str], value: Any) -> tuple[int | str, ...]:
    """The keys of a pydantic location that exist in `value`, without the names of union alternatives."""
    found: list[int | str] = []
    for part in location:
        item = isinstance(part, int) and isinstance(value, list | tuple) and part < len(value)
        if item or (isinstance(value, Mapping) and part in value):
            value = value[part]
            found.append(part)
    return tuple(found)


def _dotted(location: Iterable[int | str]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{_shown_key(str(part))}"
    return text


def _shown_key(key: str) -> str:
    return printable(key if len(key) <= MAX_SHOWN else f"{key[:MAX_SHOWN]}...")


def _known(kind: Any, location: Sequence[int | str]) -> list[str]:
    """The field names of the schema at a location."""
    kind = _inner(kind)
    for part in location[:-1]:
        fields = getattr(kind, "model_fields", {})
        kind = _inner(fields[part].annotation) if part in fields else None
    return list(getattr(kind, "model_fields", {}))


def _inner(annotation: Any) -> Any:
    """The schema in `schema | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((one for one in typing.get_args(annotation) if hasattr(one, "model_fields")), annotation)
    return annotation
