"""Handlers that make jobs: create, remix, edits, extensions, continue, replay; and plan."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from opensora.errors import OpenSoraError
from opensora.serving import fields
from opensora.serving.body import fields_of
from opensora.serving.errors import ApiError
from opensora.serving.job import COMPLETED, VideoJob
from opensora.serving.request import Checked, make_request
from opensora.serving.state import ServerState, owner_of, state_of


async def create(request: Request) -> Response:
    """POST /v1/videos"""
    state = state_of(request)
    state.check_room(owner_of(request))
    async with fields_of(request, state.limits) as given:
        checked = await _checked(state, owner_of(request), given)
    return await _queued(state, request, checked, {})


async def plan(request: Request) -> Response:
    """POST /v1/videos/plan: what a request would take; nothing is queued."""
    state = state_of(request)
    async with fields_of(request, state.limits) as given:
        checked = await _values(state, owner_of(request), given)
    answer = await state.planner.ask(plan=checked.request._asdict(), media=_media_paths(state, checked))
    ahead = sum(state.store.waiting().values()) + len(state.dispatcher.running)
    queue = {"ahead": ahead, "seconds": state.dispatcher.wait_seconds(ahead - 1) if ahead else 0}
    return JSONResponse({**answer["plan"], "model": checked.request.model, "queue": queue})


async def remix(request: Request) -> Response:
    """POST /v1/videos/{id}/remix: the same request, seed included, with another prompt; other fields may follow."""
    return await _again(request, "remix")


async def edit(request: Request) -> Response:
    """POST /v1/videos/edits: another video that follows the given one; `strength` says how far it may leave it."""
    return await _from_video(request, "edit")


async def extend(request: Request) -> Response:
    """POST /v1/videos/extensions: a video that begins with the end of the given one."""
    return await _from_video(request, "extend")


async def replay(request: Request) -> Response:
    """POST /v1/videos/{id}/replay: the same request again; `identical` then says whether the frames are the same."""
    state = state_of(request)
    source = _finished(state, request)
    checked = await _check(state, owner_of(request), source.request.given, source.request.media, source.request.model)
    return await _queued(state, request, checked, {"replay": source.id})


async def continue_draft(request: Request) -> Response:
    """POST /v1/videos/{id}/continue: the rest of the steps of a draft."""
    state = state_of(request)
    state.check_room(owner_of(request))
    source = _finished(state, request)
    if not source.draft:
        raise ApiError(409, f"video '{source.id}' is no draft; create it with draft or steps_until", code="not_a_draft")
    given = {name: value for name, value in source.request.given.items() if name not in ("draft", "steps_until")}
    checked = await _check(state, owner_of(request), given, source.request.media, source.request.model)
    return await _queued(state, request, checked, {"continue": source.id}, draft_of=source)


async def _again(request: Request, how: str) -> Response:
    state = state_of(request)
    state.check_room(owner_of(request))
    source = state.job(request.path_params["id"], owner_of(request))
    async with fields_of(request, state.limits) as given:
        changes, media, model = await _split(state, owner_of(request), given)
        kept = {name: value for name, value in source.request.given.items() if name not in ("draft", "steps_until")}
        kept = {**_without_aliases(kept, changes), **changes}
        checked = await _check(
            state, owner_of(request), kept, {**source.request.media, **media}, model or source.request.model
        )
    return await _queued(state, request, checked, {how: source.id})


async def _from_video(request: Request, how: str) -> Response:
    state = state_of(request)
    state.check_room(owner_of(request))
    async with fields_of(request, state.limits) as given:
        video = given.pop("video", None)
        if video is None:
            raise ApiError(400, "video is missing; give a file, or the id of a video", param="video")
        id = await state.uploads.media_of(owner_of(request), video, "video")
        source = state.store.get(id, owner_of(request))
        checked = await _checked(state, owner_of(request), {**_settings_like(source), **given, how: id})
    return await _queued(state, request, checked, {how: source.id} if source else {})


def _settings_like(source: VideoJob | None) -> dict[str, Any]:
    """The model and size of a job, as defaults of one that is made from it."""
    if source is None:
        return {}
    return {"model": source.request.model, "size": f"{source.width}x{source.height}"}


def _without_aliases(kept: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a job without those that `changes` give under another name."""
    groups = (
        {"size", "image_size", "width", "height", "resolution", "aspect_ratio"}, {"seconds", "num_frames"},
        {"steps", "num_inference_steps", "num_sampling_steps"}, {"cfg_scale", "guidance_scale"}, {"loop", "loops"},
    )  # fmt: skip
    dropped = {name for group in groups if group & changes.keys() for name in group}
    return {name: value for name, value in kept.items() if name not in dropped}


async def _checked(state: ServerState, owner: str, given: Mapping[str, Any]) -> Checked:
    """A request from the fields of a body, checked down to the model. Raises ApiError."""
    values, media, model = await _split(state, owner, given)
    return await _check(state, owner, values, media, model)


async def _values(state: ServerState, owner: str, given: Mapping[str, Any]) -> Checked:
    """The same without the checks that need the model."""
    values, media, model = await _split(state, owner, given)
    return await _make(state, owner, values, media, model)


async def _split(
    state: ServerState, owner: str, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, list[str]], str | None]:
    """The values, the media and the model of the fields of a body."""
    try:
        values = fields.values_of(given)
    except OpenSoraError as error:
        raise ApiError(400, str(error), code="invalid_value") from None
    media: dict[str, list[str]] = {}
    for name in (*fields.MEDIA, "input_reference"):
        value = given.get(name)
        if value is None or value == "":
            continue
        several = name == "reference_path"
        if several and isinstance(value, str):
            value = value.split(";")
        entries = value if isinstance(value, list) and several else [value]
        if len(entries) > state.limits.max_files:
            raise ApiError(400, f"{name} has {len(entries)} entries", param=name, code="invalid_value")
        media["image" if name == "input_reference" else name] = [
            await state.uploads.media_of(owner, one, name) for one in entries
        ]
    model = given.get("model")
    if model is not None and not isinstance(model, str):
        raise ApiError(400, "model must be a text", param="model", code="invalid_value")
    return values, media, model or None


async def _make(
    state: ServerState, owner: str, values: Mapping[str, Any], media: Mapping[str, list[str]], model: str | None
) -> Checked:
    """The request, checked as far as no model is needed. Raises ApiError."""
    try:
        checked = await asyncio.to_thread(
            make_request, values, media, model, state.models, state.limits, state.adapters
        )
    except OpenSoraError as error:
        code = "model_not_found" if str(error).startswith("model ") else "invalid_value"
        raise ApiError(400, str(error), code=code, param=_param(str(error))) from None
    area = checked.height * checked.width
    for entry in (entry for entries in media.values() for entry in entries):
        if state.uploads.frames(owner, entry) * area > state.limits.max_pixels:
            raise ApiError(400, f"'{entry}' is too long for this size; cut it", code="invalid_value")
    return checked


async def _check(
    state: ServerState, owner: str, values: Mapping[str, Any], media: Mapping[str, list[str]], model: str | None
) -> Checked:
    """The request, checked down to the model. Raises ApiError."""
    checked = await _make(state, owner, values, media, model)
    await state.planner.ask(check=checked.request._asdict(), media=_media_paths(state, checked))
    return checked


def _media_paths(state: ServerState, checked: Checked) -> dict[str, str]:
    entries = (entry for entries in checked.request.media.values() for entry in entries)
    return {entry.partition("#")[0]: state.uploads.path(entry) for entry in entries}


def _param(message: str) -> str | None:
    """The field that a message begins with."""
    word = message.partition(" ")[0].rstrip(":")
    return word if word in fields.NAMES else None


def _finished(state: ServerState, request: Request) -> VideoJob:
    job = state.job(request.path_params["id"], owner_of(request))
    if job.status != COMPLETED:
        raise ApiError(409, f"video '{job.id}' is {job.status}, not completed", code="not_ready")
    return job


async def _queued(
    state: ServerState, request: Request, checked: Checked, made_from: dict[str, str], draft_of: VideoJob | None = None
) -> Response:
    job = await state.queue(owner_of(request), checked, made_from, draft_of)
    return JSONResponse(state.dispatcher.public(job))
