"""Values from outside (files, flags, JSON), checked against declared types; a mistake becomes one line.

A schema is a class of fields: a wrong type, a value out of range and an unknown key are refused by name. Nothing is
guessed from text: `"3"` is no number, `True` is no count. Whole numbers may be written `3.0`, tuples as lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from opensora.errors import ConfigError, OpenSoraError, did_you_mean

SHOWN = 80  # characters of a value in a message
MAX_TEXT = 100_000  # characters of any text from outside
T = TypeVar("T")


def _as_whole(value: Any) -> Any:
    """3.0 as 3."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Int = Annotated[int, BeforeValidator(_as_whole), Field(ge=-(2**63), lt=2**63)]
Count = Annotated[Int, Field(ge=0)]  # from 0 on
Positive = Annotated[Int, Field(ge=1)]  # from 1 on
Number = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(max_length=1024)]
Pair = Annotated[tuple[T, T], BeforeValidator(_as_tuple)]
Triple = Annotated[tuple[T, T, T], BeforeValidator(_as_tuple)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Schema(BaseModel):
    """Declared fields of a mapping. Frozen; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


def check(
    kind: type[T] | Any, value: Any, where: str = "", error: type[OpenSoraError] = ConfigError, remedy: str = ""
) -> T:
    """`value` as `kind`, a `Schema` or any annotation, with whole numbers and tuples put right.

    Raises `error` with one line: `where`, the key, what it must be, what it is, and `remedy`.
    """
    try:
        return adapter(kind).validate_python(value)
    except (ValidationError, RecursionError) as failure:
        problem = explain(failure, kind) if isinstance(failure, ValidationError) else "is nested too deep"
        raise error("".join((f"{where}: " if where else "", problem, f"; {remedy}" if remedy else ""))) from None


@lru_cache(256)
def adapter(kind: Any) -> TypeAdapter:
    """What checks values of a kind."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return TypeAdapter(kind)
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def explain(failure: ValidationError, kind: Any = None) -> str:
    """The first mistake of a failed check in one line: `key must be ...; it is ...`."""
    mistakes = failure.errors(include_url=False, include_context=True)
    first = next((one for one in mistakes if one["type"] == "extra_forbidden"), mistakes[0])  # maybe a key misspelt
    key = _dotted(first["loc"])
    match first["type"]:
        case "extra_forbidden":
            return (
                f"unknown setting '{_shown_key(key)}'{did_you_mean(str(first['loc'][-1]), _known(kind, first['loc']))}"
            )
        case "invalid_key":
            return f"the key {shown(first['loc'][-1])} must be a text"
        case "missing":
            return f"setting '{key}' is missing"
        case "value_error":
            return f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    same = [one for one in mistakes if _field(one["loc"]) == _field(first["loc"])]
    expected = list(dict.fromkeys(_expected(one) for one in same))
    return (
        f"{_dotted(_field(first['loc'])) or 'the value'} must be {' or '.join(expected)}; it is {shown(first['input'])}"
    )


def shown(value: Any) -> str:
    """A value as Python writes it, cut to one short line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # numbers of thousands of digits, nests
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


_EXPECTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "int_parsing_size": "a smaller number",
    "float_type": "a number", "finite_number": "a finite number", "bool_type": "True or False",
    "string_type": "a text", "string_unicode": "UTF-8 text", "none_required": "None", "dict_type": "a dict",
    "model_type": "a dict", "mapping_type": "a dict", "list_type": "a list",
    "tuple_type": "a tuple", "bytes_type": "bytes",
}  # fmt: skip
_WITH_CONTEXT = {
    "greater_than_equal": "at least {ge}", "greater_than": "above {gt}", "less_than_equal": "at most {le}",
    "less_than": "below {lt}", "string_too_long": "at most {max_length} characters long",
    "string_too_short": "at least {min_length} characters long", "too_long": "at most {max_length} long",
    "too_short": "at least {min_length} long", "literal_error": "one of {expected}",
    "string_pattern_mismatch": "of the form {pattern}",
}  # fmt: skip


def _expected(mistake: Mapping[str, Any]) -> str:
    kind, context = mistake["type"], mistake.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _WITH_CONTEXT:
        return _WITH_CONTEXT[kind].format(**context)
    return mistake["msg"].removeprefix("Input should be ").removeprefix("Value error, ")


def _field(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A location without the names of the alternatives of a union, which pydantic appends."""
    return tuple(part for part in location if isinstance(part, int) or (str(part).isidentifier() and part not in _TAGS))


_TAGS = {"int", "float", "str", "bool", "none", "None", "dict", "list", "tuple", "function-before"}


def _dotted(location: Iterable[int | str]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{_shown_key(str(part))}"
    return text


def _shown_key(key: str) -> str:
    return key if len(key) <= SHOWN else f"{key[:SHOWN]}..."


def _known(kind: Any, location: tuple[int | str, ...]) -> list[str]:
    """The fields of the schema that lacks a key."""
    for part in location[:-1]:
        fields = getattr(kind, "model_fields", {})
        kind = fields[part].annotation if part in fields else None
    return list(getattr(kind, "model_fields", {}))
