"""What the ranks of a run start from, and what happens when the process that started them, or one of them, is gone."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from typing import Annotated

import torch.distributed as dist
from pydantic import Field

from opensora.config.schema import Int, check
from opensora.errors import ConfigError, OpenSoraError

GRACE = 30.0  # seconds in which a rank may save after its launcher is gone
EVERY = 1.0  # seconds between two looks at the launcher
TIMEOUT = 600.0  # seconds that ranks of a training wait for one another
ENVIRONMENT = "start the ranks with torchrun, or one process without WORLD_SIZE"
# How gloo words that the other end of a connection is gone or silent; other back ends raise a DistError.
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out waiting|timeout caused pair closure|gloo/", re.IGNORECASE
)


def world_size() -> int:
    """The number of ranks that a launcher such as torchrun has started; 1 without one. Raises ConfigError."""
    return _number("WORLD_SIZE", 1, 1)


def rank() -> int:
    """The number of this rank, from 0. Raises ConfigError."""
    ranks = world_size()
    if ranks > 1 and "RANK" not in os.environ:
        raise ConfigError(f"WORLD_SIZE is {ranks}, but RANK is not set; {ENVIRONMENT}")
    own = _number("RANK", 0)
    if own >= ranks:
        raise ConfigError(f"RANK is {own}, but WORLD_SIZE is {ranks}; {ENVIRONMENT}")
    return own


def local_rank() -> int:
    """The number of this rank among those of this machine, which is that of its device. Raises ConfigError."""
    return _number("LOCAL_RANK", 0)


def timeout() -> float:
    """How many seconds ranks of a training wait for one another, from OPENSORA_RANK_TIMEOUT. Raises ConfigError."""
    return _number("OPENSORA_RANK_TIMEOUT", TIMEOUT, 1)


def restarts() -> int:
    """How often torchrun has started this run again. Raises ConfigError."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def launcher() -> str:
    """What tells one start of torchrun from another, the same after its restarts; empty without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return ""
    return name if name not in ("", "none") else f"{socket.gethostname()}:{os.getppid()}"


def _number(name: str, default: float, least: int = 0) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        value: object = int(text)
    except ValueError:
        value = text
    return check(Annotated[Int, Field(ge=least)], value, f"environment variable {name}", ConfigError, ENVIRONMENT)


def end_with_launcher() -> None:
    """Has this process end when torchrun is gone: told to by SIGTERM, and by force GRACE seconds later."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), name="launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(EVERY)
    sys.stderr.write(f"error: rank {rank()}: the process that started it is gone, so it ends too\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def lost(error: BaseException | None) -> OpenSoraError | None:
    """The error of a rank that cannot reach the others, in one line; None for any other error."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(str(error))):
            said = " ".join(re.sub(r"^\[[^]]*\]", "", str(error).partition("\n")[0]).split())[:120]
            remedy = "see what ended it, and start all of them again; a training goes on with --load"
            return OpenSoraError(f"rank {rank()} has lost another rank ({said}); {remedy}")
        error = error.__cause__ or error.__context__
    return None
