"""Requests to the application within this process, byte for byte as a test wants them: no client corrects them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opensora.serving.app import make_app
from opensora.serving.errors import ApiError
from opensora.serving.limits import Limits
from opensora.serving.plan_worker import PlanWorker
from opensora.serving.state import ServerState

HOST = ("host", "localhost:8000")
BOUNDARY = "b0undary"
FORM = ("content-type", f"multipart/form-data; boundary={BOUNDARY}")
JSON = ("content-type", "application/json")


class Answer(NamedTuple):
    """What the application answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


class Application:
    """A server without processes: its planner answers here, and nothing is computed."""

    def __init__(self, folder: Path, keys: Sequence[str] = (), limits: Limits | None = None, **options: Any) -> None:
        self.app = make_app(["embedded"], folder, devices=["cpu"], keys=keys, limits=limits or Limits(), **options)
        self.state: ServerState = self.app.app.state.server  # type: ignore[attr-defined]
        worker = PlanWorker(self.state.models, "cpu")

        async def ask(**question: Any) -> dict[str, Any]:
            if "probe" in question:
                question["probe"] = str(folder / question["probe"])
            question["media"] = {id: str(folder / path) for id, path in question.get("media", {}).items()}
            answer = worker.answer(question)
            if "error" in answer:
                raise ApiError(400, answer["error"], code=answer.get("code"))
            return answer

        self.state.planner.ask = ask  # type: ignore[method-assign]

    def ask(self, method: str, path: str, *headers: tuple[str, str | bytes], **body: Any) -> Answer:
        """The answer to one request; `body` as for `request`."""
        return asyncio.run(self.request(method, path, *headers, **body))

    async def request(
        self, method: str, path: str, *headers: tuple[str, str | bytes], body: bytes | Sequence[bytes] = b"",
        pause: float = 0.0,
    ) -> Answer:  # fmt: skip
        """Sends a body in its pieces, with pauses between them. Without a Host among the headers, HOST is sent."""
        raw_path, _, query = path.partition("?")
        given = [(name.lower().encode(), v if isinstance(v, bytes) else v.encode()) for name, v in headers]
        if not any(name == b"host" for name, _ in given):
            given.insert(0, (HOST[0].encode(), HOST[1].encode()))
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": _unquoted(raw_path), "raw_path": raw_path.encode(), "query_string": query.encode(), "root_path": "",
            "headers": [one for one in given if one[1] != b"-absent-"], "client": ("127.0.0.1", 1), "server": None,
        }  # fmt: skip
        pieces = list([body] if isinstance(body, bytes) else body)
        answer: dict[str, Any] = {"body": b"", "status": 0, "headers": {}}

        async def receive() -> dict[str, Any]:
            if not pieces:
                await asyncio.sleep(3600)
            if pause:
                await asyncio.sleep(pause)
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer["status"] = message["status"]
                answer["headers"] = {n.decode().lower(): v.decode("latin-1") for n, v in message["headers"]}
            else:
                answer["body"] += message.get("body", b"")

        await self.app(scope, receive, send)  # type: ignore[arg-type]
        return Answer(**answer)

    def post(self, path: str, fields: Any, *headers: tuple[str, str]) -> Answer:
        """POST of JSON."""
        return self.ask("POST", path, JSON, *headers, body=json.dumps(fields).encode())

    def form(self, path: str, *parts: tuple[str, bytes] | tuple[str, bytes, str]) -> Answer:
        """POST of a form; a part with a third entry is a file of that name."""
        return self.ask("POST", path, FORM, body=form_body(*parts))


def form_body(*parts: tuple[str, bytes] | tuple[str, bytes, str]) -> bytes:
    """The bytes of a form."""
    body = b""
    for name, content, *file in parts:
        extra = f'; filename="{file[0]}"' if file else ""
        body += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


def _unquoted(path: str) -> str:
    from urllib.parse import unquote

    return unquote(path)
