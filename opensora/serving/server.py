"""Runs the server: `opensora serve`."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora.errors import ConfigError
from opensora.remote.chat import Endpoint
from opensora.serving.limits import Limits
from opensora.serving.worker_program import RayCluster

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

logger = logging.getLogger("opensora")

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_CONNECTIONS = 1_000
KEEP_ALIVE, SHUTDOWN = 15, 5  # seconds
BACKLOG = 1_024


def serve(
    models: Sequence[str], host: str, port: int, folder: Path, *, keys: Sequence[str], devices: Sequence[str],
    hosts: Sequence[str], adapters: Sequence[str], allow_anonymous: bool, limits: Limits,
    cluster: RayCluster | None = None, language_model: Endpoint | None = None,
) -> None:  # fmt: skip
    """Serves until a stop signal. Raises ConfigError for an address that anybody could use, or that is taken."""
    try:
        import python_multipart  # noqa: F401  # starlette imports it when a form comes
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"opensora serve needs {error.name}; pip install 'opensora[serve]'") from None
    from opensora.serving.app import make_app

    if host not in LOOPBACK and not keys and not allow_anonymous:
        remedy = "set OPENSORA_API_KEY or give --api-key, or --allow-anonymous to let anybody in"
        raise ConfigError(f"--host {host} can be reached from other machines; {remedy}")
    if any(not key.strip() or len(key) < 8 for key in keys):
        raise ConfigError("a key has fewer than 8 characters; make one with: openssl rand -hex 24")
    listener = _listen(host, port)
    app = make_app(
        models, folder, devices=devices, keys=keys, hosts=[host, *hosts], adapters=adapters, limits=limits,
        cluster=cluster, language_model=language_model,
    )  # fmt: skip
    logger.info("http://%s:%d", f"[{host}]" if ":" in host else host, listener.getsockname()[1])
    uvicorn.Server(configuration(app)).run(sockets=[listener])


def configuration(app: ASGIApp, **options: Any) -> uvicorn.Config:
    """How the application is served: with bounds on connections and their heads."""
    import uvicorn

    from opensora.serving.connection import TimedConnection

    return uvicorn.Config(
        app, http=TimedConnection, log_level="warning", access_log=False, server_header=False,
        limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=SHUTDOWN,
        proxy_headers=False, **options,
    )  # fmt: skip


def _listen(host: str, port: int) -> socket.socket:
    """A socket on the address. Raises ConfigError where it cannot be had."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port is {port}; give 0 to {2**16 - 1}")
    try:
        [(family, *_, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)  # from now on: clients wait while the server starts
    except (OSError, OverflowError) as error:
        problem = getattr(error, "strerror", None) or error
        raise ConfigError(f"{host}:{port} cannot be used ({problem}); choose another --host or --port") from error
    return listener
