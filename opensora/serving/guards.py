"""What every request passes before a handler sees it: keys, hosts, origins, sizes, time limits, headers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opensora.serving.errors import ApiError
from opensora.serving.limits import Limits

ANYBODY = "-"  # the owner where no key is needed
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
RECEIVE_SECONDS = 20.0  # between two pieces of a body
BYTES_PER_SECOND = 16_384  # slower bodies are refused after RECEIVE_SECONDS
SEND_SECONDS = 60.0  # that a client may take for a piece of an answer
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "content-security-policy": _POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin", "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY", "permissions-policy": "camera=(), microphone=(), geolocation=()",
}  # fmt: skip


def key_owner(key: str) -> str:
    """The owner that a key stands for: a hash, so that the database holds no key."""
    return hashlib.sha256(key.encode()).hexdigest()[:32]


class Guards:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, limits: Limits, keys: Sequence[str], hosts: Sequence[str]) -> None:
        """`hosts` are the names by which the server may be called; without keys, others are refused."""
        self.app, self.limits = app, limits
        self.keys = [(hashlib.sha256(key.encode()).digest(), key_owner(key)) for key in keys]
        self.hosts = {*LOOPBACK, *hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        send = _with_headers(send, scope)
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            _check_origin(scope["path"], headers)
            scope["owner"] = self._owner(scope["path"], headers)
            _check_length(headers, self._limit(headers))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, _bounded(receive, self._limit(headers)), send)

    def _check_host(self, headers: Headers) -> None:
        """Refuses foreign names, which a page elsewhere may have pointed at this machine. With keys it cannot."""
        if len(headers.getlist("host")) != 1:
            raise ApiError(400, "a request needs one Host", code="bad_host")
        if not self.keys and _host_name(headers["host"]) not in self.hosts:
            raise ApiError(403, "this server is not called by that name; see --allow-host", code="bad_host")

    def _owner(self, path: str, headers: Headers) -> str:
        """The owner of the key. Raises ApiError 401."""
        if not self.keys:
            return ANYBODY
        if not _is_interface(path):
            return ANYBODY
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest, found = hashlib.sha256(key.strip().encode(errors="replace")).digest(), None
        for known, owner in self.keys:  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, digest):
                found = owner
        if found is None or scheme.lower() != "bearer":
            raise ApiError(401, "give a valid key: Authorization: Bearer KEY", code="invalid_api_key")
        return found

    def _limit(self, headers: Headers) -> int:
        multipart = headers.get("content-type", "").lower().startswith("multipart/form-data")
        return self.limits.max_upload if multipart else self.limits.max_json


def _is_interface(path: str) -> bool:
    """Whether a path is more than /health and the files of the page, which need no key."""
    return path.startswith("/v1") or path == "/metrics"


def _host_name(host: str) -> str:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and ":" in host else host
    return name.lower().rstrip(".")


def _check_origin(path: str, headers: Headers) -> None:
    """Refuses requests that a page of another site makes a browser send. Links to the page itself are free."""
    if not _is_interface(path):
        return
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        raise ApiError(403, "requests from other sites are refused", code="cross_site")
    if site not in ("none", "same-origin"):
        raise ApiError(403, "requests from other sites are refused", code="cross_site")


def _check_length(headers: Headers, limit: int) -> None:
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 15:
        raise ApiError(400, "Content-Length is not a number", code="bad_length")
    if int(length) > limit:
        raise ApiError(413, f"the body is larger than {limit:,} bytes, the limit", code="too_large")


def _bounded(receive: Receive, limit: int) -> Receive:
    """`receive` that raises ApiError for a body that is too large, or comes too slowly."""
    loop = asyncio.get_running_loop()
    begin, size, ended = loop.time(), 0, False

    async def bounded() -> Message:
        nonlocal size, ended
        if ended:  # waits for the client to leave, as long as the answer takes
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), RECEIVE_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, "the body came too slowly", code="too_slow") from None
        size += len(message.get("body", b""))
        ended = message["type"] != "http.request" or not message.get("more_body", False)
        if size > limit:
            raise ApiError(413, f"the body is larger than {limit:,} bytes, the limit", code="too_large")
        if not ended and loop.time() - begin > RECEIVE_SECONDS + size / BYTES_PER_SECOND:
            raise ApiError(408, "the body came too slowly", code="too_slow")
        return message

    return bounded


def _with_headers(send: Send, scope: Scope) -> Send:
    """`send` that adds the security headers, and gives up on a client that does not read."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message["headers"]}
            added = [(n.encode(), v.encode()) for n, v in SECURITY_HEADERS.items() if n.encode() not in names]
            if scope["path"].startswith("/v1/") and b"cache-control" not in names:
                added.append((b"cache-control", b"no-store"))
            message = {**message, "headers": [*message["headers"], *added]}
        await asyncio.wait_for(send(message), SEND_SECONDS)

    return sending
