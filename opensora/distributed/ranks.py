"""The ranks that torchrun, or a launcher like it, names in the environment. Imports nothing heavy."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

from opensora.errors import ConfigError

RANK_TIMEOUT = 600  # seconds that the ranks of a training wait for one another
_REMEDY = "start the ranks with torchrun, or unset WORLD_SIZE"


class Ranks(NamedTuple):
    """This process among the ranks of a run."""

    rank: int
    world_size: int
    local_rank: int  # among the ranks of this machine; the number of its device


def world_size() -> int:
    """The number of ranks; 1 without torchrun. Raises ConfigError."""
    return _number("WORLD_SIZE", 1, least=1)


def rank() -> int:
    """The number of this rank, from 0. Raises ConfigError."""
    return ranks().rank


def ranks(connecting: bool = False) -> Ranks:
    """The place of this process among the ranks. Raises ConfigError for missing or wrong variables.

    `connecting` also requires the address by which the ranks find one another.
    """
    count = world_size()
    if count == 1:
        return Ranks(0, 1, 0)
    _require("RANK", count)
    own = Ranks(_number("RANK", 0, most=count - 1), count, _number("LOCAL_RANK", 0, most=count - 1))
    if connecting:
        _require("MASTER_ADDR", count)
        _require("MASTER_PORT", count)
        _number("MASTER_PORT", 0, most=65535)
    return own


def _require(name: str, count: int) -> None:
    if not os.environ.get(name):
        raise ConfigError(f"WORLD_SIZE is {count}, but {name} is not set; {_REMEDY}")


def rank_timeout() -> int:
    """Seconds that the ranks of a training wait for one another: OPENSORA_RANK_TIMEOUT. Raises ConfigError."""
    return _number("OPENSORA_RANK_TIMEOUT", RANK_TIMEOUT, least=1)


def restart_count() -> int:
    """How often torchrun has restarted this run. Raises ConfigError."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0, empty_is_unset=False)


def started_by_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch_id() -> str:
    """Identifies a start of torchrun; the same after its restarts, empty without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return ""
    return name if name not in ("", "none") else f"{socket.gethostname()}:{os.getppid()}"


def _number(name: str, default: int, least: int = 0, most: int = 2**20, empty_is_unset: bool = True) -> int:
    text = os.environ.get(name, str(default)) or (str(default) if empty_is_unset else "")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise ConfigError(f"{name} is {text[:40]!r}, not an integer from {least} to {most}; {_REMEDY}")
    return int(text)
