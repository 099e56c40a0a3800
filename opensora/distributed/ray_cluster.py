"""A connection to a Ray cluster, for whatever runs tasks or actors on it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from opensora.errors import ConfigError, printable

CONNECT_SECONDS = 10.0


def check_ray() -> None:
    """Raises ConfigError without Ray; does not import it."""
    if find_spec("ray") is None:
        raise ConfigError("--executor ray needs Ray; pip install 'opensora[ray]'")


@contextmanager
def connected(address: str, *, show_logs: bool = False) -> Iterator[Any]:
    """The module `ray`, connected to the cluster at `address`; `local` starts one on this machine for the block.

    A connection that this process already has is used, and stays. With `show_logs`, what workers print goes to standard
    error. Raises ConfigError without Ray and without the cluster.
    """
    check_ray()
    _check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report the use of it
    import ray

    started = not ray.is_initialized()
    if started:
        own = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address, log_to_driver=show_logs, logging_level=logging.ERROR, **own)
        except Exception as error:  # Ray raises anything
            reason = printable(" ".join(str(error).split()))[:200]
            raise ConfigError(f"--address {address}: no Ray cluster can be used there ({reason})") from error
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Raises ConfigError where nothing listens at HOST:PORT; Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # a word, such as `auto`
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS):
            pass
    except (OSError, OverflowError, UnicodeError) as error:
        problem = getattr(error, "strerror", None) or type(error).__name__
        raise ConfigError(f"--address {address}: no Ray cluster can be used there ({problem})") from error
