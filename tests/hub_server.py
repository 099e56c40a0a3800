"""A stand-in for the hub on 127.0.0.1, for the hub's own client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandIn:
    """Repositories of files; `refused` answers with a status, `cut` files end half-way. `asked` are all requests."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refused: dict[str, int] = {}
        self.cut: set[str] = set()
        self.asked: list[str] = []


def _handler(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            parts = self.path.split("?")[0].strip("/").split("/")
            repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            if repo in hub.refused or repo not in hub.repositories:
                return self.answer(hub.refused.get(repo, 404), b"")
            files = hub.repositories[repo]
            if parts[0] != "api":
                name = "/".join(parts[4:])
                return self.answer(200, files[name], name) if name in files else self.answer(404, b"")
            if "tree" in parts:
                listed = [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in files.items()]
                return self.answer(200, json.dumps(listed).encode())
            siblings = [{"rfilename": name} for name in files]
            told = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}
            return self.answer(200, json.dumps(told).encode())

        def answer(self, status: int, content: bytes, name: str = "") -> None:
            begin = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
            content = content[begin:]
            self.send_response(206 if begin and status == 200 else status)
            for key, value in (("ETag", f'"{_oid(content)}"'), ("X-Repo-Commit", COMMIT), ("Connection", "close")):
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[: len(content) // 2] if name in hub.cut else content)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub_server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A hub that this process asks, and an empty cache."""
    from huggingface_hub import hf_api

    hub = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's tries
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
