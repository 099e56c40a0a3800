"""The body of a request as fields: JSON, or a form as the OpenAI client sends it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.datastructures import FormData
from starlette.requests import Request

from opensora.errors import MediaError
from opensora.files import parse_json
from opensora.serving.errors import ApiError
from opensora.serving.limits import Limits

MAX_FIELDS = 200
MAX_FIELD_BYTES = 2**20  # of a field that is no file
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,63})(?:\[([A-Za-z_]{0,32})\]|\[\d{1,3}\])?")


@asynccontextmanager
async def fields_of(request: Request, limits: Limits) -> AsyncIterator[dict[str, Any]]:
    """The fields of a body; files are open within the block. Raises ApiError for a body that is neither."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        yield _json(await request.body(), limits)
    elif kind == "multipart/form-data":
        options = {"max_files": limits.max_files, "max_fields": MAX_FIELDS, "max_part_size": MAX_FIELD_BYTES}
        async with request.form(**options) as form:
            yield _form(form)
    else:
        raise ApiError(415, "send application/json or multipart/form-data", code="unsupported_media_type")


def _json(body: bytes, limits: Limits) -> dict[str, Any]:
    try:
        value = parse_json(body or b"{}", "the body", max_bytes=limits.max_json)
    except MediaError as error:
        raise ApiError(400, str(error), code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return value


def _form(form: FormData) -> dict[str, Any]:
    """`name` and `name[key]` of a form as fields; a name that is repeated, or ends in [], is a list."""
    fields: dict[str, Any] = {}
    for raw, value in form.multi_items():
        match = _NAME.fullmatch(raw)
        if match is None:
            raise ApiError(400, f"{raw[:80]!r} is no name of a field", code="invalid_field")
        name, key = match[1], match[2]
        if key:
            inner = fields.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ApiError(400, f"{name} is given twice", param=name, code="invalid_field")
            inner[key] = value
        elif name in fields or raw.endswith("]"):
            before = fields.get(name, [])
            fields[name] = [*(before if isinstance(before, list) else [before]), value]
        else:
            fields[name] = value
    return fields
