"""Handler that has the server's language model rewrite a prompt."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from opensora.serving.body import fields_of
from opensora.serving.errors import ApiError
from opensora.serving.state import state_of

MAX_CHARACTERS = 4_000  # of a prompt


async def refine(request: Request) -> Response:
    """POST /v1/prompts/refine"""
    state = state_of(request)
    if state.refiner is None:
        raise ApiError(404, "this server refines no prompts; see `opensora serve --llm-refine`", code="not_found")
    async with fields_of(request, state.limits) as given:
        prompt = given.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ApiError(400, "prompt is missing; describe the video in a text", param="prompt", code="invalid_value")
    if len(prompt) > MAX_CHARACTERS:
        problem = f"prompt has {len(prompt):,} characters; at most {MAX_CHARACTERS:,} are refined"
        raise ApiError(400, problem, param="prompt", code="invalid_value")
    return JSONResponse({"object": "prompt", "prompt": await state.refiner.refine(prompt)})
