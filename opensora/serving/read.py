"""Handlers that tell: jobs, their content and events, models, health, metrics; and cancel, delete, uploads."""

from __future__ import annotations

import os
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from opensora import __version__
from opensora.config.settings import InferenceSettings
from opensora.serving import folders
from opensora.serving.body import fields_of
from opensora.serving.errors import ApiError, not_found
from opensora.serving.events import Event, EventResponse
from opensora.serving.job import COMPLETED, FINAL, QUEUED, RUNNING, VideoJob
from opensora.serving.metrics import metrics_text
from opensora.serving.models import described
from opensora.serving.state import ServerState, owner_of, state_of
from opensora.serving.store import StoredFile, media_in_use

MAX_PAGE, PAGE = 100, 20
VARIANTS = ("video", "thumbnail", "spritesheet")


async def list_videos(request: Request) -> Response:
    """GET /v1/videos?after=&limit=&order="""
    state, owner, query = state_of(request), owner_of(request), request.query_params
    after, limit, order = query.get("after"), query.get("limit", str(PAGE)), query.get("order", "desc")
    if not (limit.isdecimal() and len(limit) < 4 and 1 <= int(limit) <= MAX_PAGE):
        raise ApiError(400, f"limit must be 1 to {MAX_PAGE}", param="limit", code="invalid_value")
    if order not in ("asc", "desc"):
        raise ApiError(400, "order must be asc or desc", param="order", code="invalid_value")
    if after and state.store.get(after, owner) is None:
        raise not_found("video", after)
    jobs, has_more = state.store.page(owner, after, int(limit), order == "desc")
    data = [state.dispatcher.public(job) for job in jobs]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JSONResponse({"object": "list", "data": data, **ends, "has_more": has_more})


async def retrieve(request: Request) -> Response:
    """GET /v1/videos/{id}"""
    state = state_of(request)
    job = state.job(request.path_params["id"], owner_of(request))
    body = state.dispatcher.public(job)
    if job.status == QUEUED:
        body["queue_position"] = state.store.position(job)
    return JSONResponse(body)


async def content(request: Request) -> Response:
    """GET /v1/videos/{id}/content?variant=video|thumbnail|spritesheet"""
    state, variant = state_of(request), request.query_params.get("variant", "video")
    job = _completed(state, request)
    if variant not in VARIANTS:
        raise ApiError(400, f"variant must be one of {', '.join(VARIANTS)}", param="variant", code="invalid_value")
    media = folders.media_file(job)
    names = {"thumbnail": folders.THUMBNAIL, "spritesheet": folders.SPRITESHEET}
    path = media.with_name(names[variant]) if variant in names else media
    return _file(state, path, f"{job.id}{path.suffix}" if path == media else f"{job.id}-{path.name}")


async def recipe(request: Request) -> Response:
    """GET /v1/videos/{id}/recipe: all that is needed to make the same frames again."""
    state = state_of(request)
    job = _completed(state, request)
    return _file(state, folders.recipe_file(job), f"{job.id}.json")


async def events(request: Request) -> Response:
    """GET /v1/videos/{id}/events, and GET /v1/videos/events for all jobs of a key"""
    state, owner, id = state_of(request), owner_of(request), request.path_params.get("id")
    job = state.job(id, owner) if id else None

    def is_last(event: Event) -> bool:
        name, data = event
        return job is not None and (name == "deleted" or (name == "status" and data["status"] in FINAL))

    stream = state.events.open(owner, id)
    first = _snapshot(state, owner, [job] if job else None)
    return EventResponse(state.events, stream, stream.text(first, is_last))


def _snapshot(state: ServerState, owner: str, jobs: list[VideoJob] | None) -> list[Event]:
    """Where the jobs stand: the first events of a stream. Without `jobs`, those of the owner that run or wait."""
    dispatcher = state.dispatcher
    if jobs is None:
        jobs = [one.job for one in dispatcher.running.values() if one.job.owner == owner]
        jobs += [one for one in state.store.with_status(QUEUED) if one.owner == owner]
    found: list[Event] = []
    for job in jobs:
        found.append(("status", dispatcher.public(job)))
        if running := dispatcher.running.get(job.id):
            found.append(("progress", dispatcher.progress_of(job)))
            if running.preview:
                found.append(("preview", running.preview))
    return found


async def cancel(request: Request) -> Response:
    """POST /v1/videos/{id}/cancel: ends a job; a finished one stays as it is."""
    state = state_of(request)
    job = state.job(request.path_params["id"], owner_of(request))
    if not job.is_final:
        state.dispatcher.cancel(job)
    return JSONResponse(state.dispatcher.public(job))


async def delete(request: Request) -> Response:
    """DELETE /v1/videos/{id}"""
    state = state_of(request)
    job = state.job(request.path_params["id"], owner_of(request))
    state.delete(job)
    return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})


async def create_file(request: Request) -> Response:
    """POST /v1/files: uploads an image or video; its id can be given wherever a request takes one."""
    state = state_of(request)
    async with fields_of(request, state.limits) as given:
        file = given.get("file")
        if file is None or not hasattr(file, "read"):
            raise ApiError(400, "file is missing; send it in a form", param="file", code="invalid_value")
        stored = await state.uploads.save(owner_of(request), file.filename or "file", file.file)
    return JSONResponse(_public_file(stored))


async def retrieve_file(request: Request) -> Response:
    """GET /v1/files/{id}"""
    return JSONResponse(_public_file(_stored_file(request)))


async def file_content(request: Request) -> Response:
    """GET /v1/files/{id}/content"""
    stored = _stored_file(request)
    return _file(state_of(request), stored.path, f"{stored.id}{stored.suffix}")


async def delete_file(request: Request) -> Response:
    """DELETE /v1/files/{id}; 409 while a job needs it."""
    state, stored = state_of(request), _stored_file(request)
    unfinished = [*state.store.with_status(QUEUED), *state.store.with_status(RUNNING)]
    if stored.id in media_in_use(unfinished):
        raise ApiError(409, f"a job needs file '{stored.id}'; cancel it first", code="in_use")
    state.uploads.delete(stored)
    return JSONResponse({"id": stored.id, "object": "file", "deleted": True})


async def models(request: Request) -> Response:
    """GET /v1/models, with what requests get by default and may choose"""
    state = state_of(request)
    common = {"object": "model", "created": int(state.started_at), "owned_by": "opensora", "adapters": state.adapters}
    data = [
        {"id": name, **common, "refines_prompts": _refines(state, one), **described(one)}
        for name, one in state.models.items()
    ]
    return JSONResponse({"object": "list", "data": data})


def _refines(state: ServerState, model: InferenceSettings) -> bool:
    """Whether the language model of the server rewrites prompts of a model: those of some are numbers of classes."""
    return state.refiner is not None and model.section("text_encoder")["type"] != "classes"


async def health(request: Request) -> Response:
    """GET /health: 200 while jobs can be computed or are about to, else 503"""
    dispatcher = state_of(request).dispatcher
    broken = dispatcher.broken
    body = {"status": "broken" if broken else "ok", "workers": dispatcher.ready, "version": __version__}
    return JSONResponse(body | ({"problem": broken} if broken else {}), status_code=503 if broken else 200)


async def metrics(request: Request) -> Response:
    """GET /metrics: the text format of Prometheus"""
    return PlainTextResponse(metrics_text(state_of(request)), media_type="text/plain; version=0.0.4")


def _file(state: ServerState, path: str | os.PathLike[str], name: str) -> Response:
    whole = state.store.folder / path
    if not whole.is_file():
        raise not_found("file", name)
    kinds = {".mp4": "video/mp4", ".png": "image/png", ".json": "application/json"}
    headers = {"content-disposition": f'inline; filename="{name}"'}
    return FileResponse(whole, media_type=kinds.get(whole.suffix, "application/octet-stream"), headers=headers)


def _completed(state: ServerState, request: Request) -> VideoJob:
    job = state.job(request.path_params["id"], owner_of(request))
    if job.status != COMPLETED:
        raise ApiError(404, f"video '{job.id}' is {job.status}; it has no content yet", code="not_ready")
    return job


def _stored_file(request: Request) -> StoredFile:
    stored = state_of(request).store.file(request.path_params["id"], owner_of(request))
    if stored is None:
        raise not_found("file", request.path_params["id"])
    return stored


def _public_file(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id, "object": "file", "bytes": file.bytes, "created_at": int(file.created_at),
        "filename": file.name, "purpose": "vision", "frames": file.frames, "status": "processed",
    }  # fmt: skip
