"""Errors of requests, in the shape that clients of OpenAI's interface read."""

from __future__ import annotations

import re
from typing import Any

from starlette.responses import JSONResponse

from opensora.errors import printable

MAX_MESSAGE = 1_500  # characters
_FOLDERS = re.compile(r"(?<![\w/.:])/(?:[^/\s'\";,:]+/)+")  # of an absolute path


class ApiError(Exception):
    """An answer with an error status. `param` is the field at fault, `retry_after` seconds to wait."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    def response(self) -> JSONResponse:
        """The error as JSON."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error_body(self), status_code=self.status, headers=headers)


def error_body(error: ApiError) -> dict[str, Any]:
    """`{"error": {...}}`."""
    content = {"message": public(str(error)), "type": _type(error.status), "param": error.param, "code": error.code}
    return {"error": content}


def _type(status: int) -> str:
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def public(message: str) -> str:
    """A message on one line without folders of the server: absolute paths are cut to their last part."""
    line = printable(message).replace("\n", " ")
    return _FOLDERS.sub("", line)[:MAX_MESSAGE]


def not_found(what: str, name: str) -> ApiError:
    """404 for something that does not exist, or belongs to another key."""
    return ApiError(404, f"{what} '{name[:80]}' does not exist; it may have expired", code="not_found")
