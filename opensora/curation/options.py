"""Settings of curation as typed on a command line."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from opensora.errors import ConfigError


def parse_options(words: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`STAGE.NAME=VALUE` words as stage -> name -> value; values are numbers, True, False, None or texts.

    Raises ConfigError for words of another form.
    """
    options: dict[str, dict[str, Any]] = {}
    for word in words:
        place, equals, value = word.partition("=")
        stage, dot, name = place.partition(".")
        if not (equals and dot and stage and name):
            raise ConfigError(f"--set {word!r}: write it as STAGE.NAME=VALUE, such as scenes.threshold=3.5")
        options.setdefault(stage, {})[name] = _value(value)
    return options


def _value(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if value is None or isinstance(value, bool | int | float | str) else text


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """`i/n` as (i, n). Raises ConfigError unless 0 <= i < n."""
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index[:9]) < int(count[:9])):
        raise ConfigError(f"--shard {text!r}: write it as I/N with 0 <= I < N, such as 0/4")
    return int(index[:9]), int(count[:9])
