"""The application: routes, and the parts of a server put together."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from opensora.remote.chat import Endpoint
from opensora.serving import create, read
from opensora.serving.adapters import copy_adapters
from opensora.serving.dispatcher import Dispatcher
from opensora.serving.errors import ApiError, error_body
from opensora.serving.events import Events
from opensora.serving.guards import Guards
from opensora.serving.language_model import PromptRefiner
from opensora.serving.limits import Limits
from opensora.serving.models import load_models
from opensora.serving.planner import Planner
from opensora.serving.refine import refine
from opensora.serving.retention import keep_clean
from opensora.serving.state import ServerState
from opensora.serving.store import Store
from opensora.serving.uploads import Uploads
from opensora.serving.worker_program import RayCluster, worker_program

PAGE = Path(__file__).parent / "static"
ROUTES: list[BaseRoute] = [
    Route("/health", read.health),
    Route("/metrics", read.metrics),
    Route("/v1/models", read.models),
    Route("/v1/videos", create.create, methods=["POST"]),
    Route("/v1/videos", read.list_videos),
    Route("/v1/videos/plan", create.plan, methods=["POST"]),
    Route("/v1/videos/edits", create.edit, methods=["POST"]),
    Route("/v1/videos/extensions", create.extend, methods=["POST"]),
    Route("/v1/videos/events", read.events),
    Route("/v1/videos/{id}", read.retrieve),
    Route("/v1/videos/{id}", read.delete, methods=["DELETE"]),
    Route("/v1/videos/{id}/content", read.content),
    Route("/v1/videos/{id}/recipe", read.recipe),
    Route("/v1/videos/{id}/events", read.events),
    Route("/v1/videos/{id}/cancel", read.cancel, methods=["POST"]),
    Route("/v1/videos/{id}/remix", create.remix, methods=["POST"]),
    Route("/v1/videos/{id}/continue", create.continue_draft, methods=["POST"]),
    Route("/v1/videos/{id}/replay", create.replay, methods=["POST"]),
    Route("/v1/prompts/refine", refine, methods=["POST"]),
    Route("/v1/files", read.create_file, methods=["POST"]),
    Route("/v1/files/{id}", read.retrieve_file),
    Route("/v1/files/{id}", read.delete_file, methods=["DELETE"]),
    Route("/v1/files/{id}/content", read.file_content),
]


def make_app(
    models: Sequence[str], folder: Path, *, devices: Sequence[str] = (), keys: Sequence[str] = (),
    hosts: Sequence[str] = (), adapters: Sequence[str] = (), limits: Limits | None = None,
    cluster: RayCluster | None = None, language_model: Endpoint | None = None,
) -> ASGIApp:  # fmt: skip
    """The application of a server whose queue and results are in `folder`.

    models: names of `opensora models` or configurations, the first being the default
    devices: names of devices, one worker each; none: all that there are
    keys: who gives one of them is served; none: everybody
    adapters: LoRA files that requests may name, each FILE or NAME=FILE
    hosts: names by which the server may be called, beside the loopback's
    cluster: a Ray cluster whose actors compute the jobs, in place of processes on this machine
    language_model: rewrites prompts for those who ask
    Raises ConfigError.
    """
    limits, folder = limits or Limits(), folder.resolve()
    loaded, names = load_models(models), [_absolute(name) for name in models]
    store, events = Store(folder), Events(limits)
    copied = copy_adapters(adapters, folder)
    dispatcher = Dispatcher(store, events, limits, worker_program(names, folder, cluster), list(devices) or [None])
    planner = Planner(names, devices[0] if devices else None, folder, limits)
    uploads = Uploads(store, planner, limits)
    refiner = PromptRefiner(language_model) if language_model else None
    state = ServerState(limits, loaded, store, events, dispatcher, planner, uploads, time.time(), copied, refiner)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        store.requeue_running()
        dispatcher.start()
        tasks = [asyncio.create_task(keep_clean(state)), asyncio.create_task(planner.warm_up())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            events.close()
            await dispatcher.stop()
            await planner.stop()
            store.close()

    page: list[BaseRoute] = [Mount("/", StaticFiles(directory=PAGE, html=True))] if PAGE.is_dir() else []
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _server_error}
    app = Starlette(routes=[*ROUTES, *page], exception_handlers=handlers, lifespan=lifespan)  # type: ignore[arg-type]
    app.state.server = state
    return Guards(app, limits, keys, hosts)


def _absolute(name: str) -> str:
    """A configuration file by its whole path: workers run in another folder."""
    return str(Path(name).resolve()) if Path(name).is_file() else name


async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    body = error_body(ApiError(error.status_code, str(error.detail)))
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _server_error(request: Request, error: Exception) -> Response:
    return ApiError(500, "the server failed; its log says more", code="server_error").response()
