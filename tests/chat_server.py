"""A stand-in for the server of a language model, on this machine: it answers what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


def sends(body: bytes | str, status: int = 200, **headers: str) -> Answer:
    """An answer with this body."""
    data = body.encode() if isinstance(body, str) else body

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def says(content: object) -> Answer:
    """The answer of a language model."""
    return sends(json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}))


def drips(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b" ")


def silent(handler: BaseHTTPRequestHandler) -> None:
    handler.server.closing.wait()


def hangs_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


class Server(ThreadingHTTPServer):
    """Gives its `answers` in turn, the last one again and again, and keeps what it was `asked`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Answer] = [says("A Small Cat.")]
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.closing = threading.Event()

    def shutdown(self) -> None:
        self.closing.set()
        super().shutdown()

    def handle_error(self, *_: object) -> None:
        """Nothing: a client that has waited long enough goes away."""

    @property
    def texts(self) -> list[str]:
        return [json.loads(body)["messages"][1]["content"] for _, _, body in self.asked]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, dict(self.headers), body))
        self.server.answers[min(len(self.server.asked), len(self.server.answers)) - 1](self)

    do_GET = do_POST  # what a redirect would become if it were followed

    def log_message(self, *_: object) -> None:
        pass
