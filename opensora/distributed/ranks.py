"""The ranks that torchrun, or what stands in for it, has named in the environment. Imports nothing heavy."""

from __future__ import annotations

import os
from typing import NamedTuple

from opensora.errors import ConfigError

_REMEDY = "start the ranks with torchrun, or unset WORLD_SIZE"


class Ranks(NamedTuple):
    """This process among the others: its number, how many there are, and its number on this machine."""

    rank: int
    count: int
    local: int


def world_size() -> int:
    """How many ranks there are; one without torchrun. Raises ConfigError for what is no number."""
    return _number("WORLD_SIZE", 1, least=1)


def ranks(connecting: bool = False) -> Ranks:
    """The place of this process. Raises ConfigError for what is missing or out of range.

    `connecting`: the ranks are about to find one another, so that there must be an address, too.
    """
    count = world_size()
    if count == 1:
        return Ranks(0, 1, 0)
    needed = ("RANK", *(("MASTER_ADDR", "MASTER_PORT") if connecting else ()))
    if absent := [name for name in needed if not os.environ.get(name)]:
        raise ConfigError(f"WORLD_SIZE is {count}, but {absent[0]} is not set; {_REMEDY}")
    if connecting:
        _number("MASTER_PORT", 0, most=65535)
    return Ranks(_number("RANK", 0, most=count - 1), count, _number("LOCAL_RANK", 0, most=count - 1))


def _number(name: str, default: int, least: int = 0, most: int = 2**20) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise ConfigError(f"{name} is {text[:40]!r}, not a whole number from {least} to {most}; {_REMEDY}")
    return int(text)
