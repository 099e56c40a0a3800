"""Requests of somebody who wants the server's files, time or memory. Each is refused or bounded; the server goes on."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import uvicorn

from opensora.datasets.video import encode_image, write_video
from opensora.errors import ConfigError
from opensora.serving import connection, guards, server
from opensora.serving.limits import Limits
from tests.serving.asgi import BOUNDARY, FORM, JSON, Answer, Application, form_body

PROMPT = "a red circle"
KEY = "a-key-of-some-length"
SMALL = {"prompt": PROMPT, "num_frames": 1, "steps": 2}
LIMITS = Limits(max_upload=400_000, max_json=100_000, max_files=4, max_queued=50, max_upload_frames=60)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Application:
    return Application(tmp_path_factory.mktemp("attacked") / "data", limits=LIMITS)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Application:
    return Application(tmp_path_factory.mktemp("locked") / "data", [KEY, "another-key"], LIMITS)


def refused(answer: Answer, *statuses: int) -> None:
    """Checks an answer that gives nothing away."""
    assert answer.status in (statuses or (400,)), (answer.status, answer.body[:500])
    assert b"/data" not in answer.body and b"Traceback" not in answer.body and len(answer.body) < 4_000
    assert answer.headers["x-content-type-options"] == "nosniff" and "default-src 'none'" in str(answer.headers)


PATHS = [
    "/v1/videos/..%2f..%2fqueue.sqlite", "/v1/videos/../../etc/passwd", "/v1/videos/%2e%2e/content",
    "/v1/videos/video_0%00/content", f"/v1/videos/{'a' * 5_000}", "/v1/files/..%2f..%2fqueue.sqlite/content",
    "/v1/files/%2fetc%2fpasswd", "//etc/passwd", "/..%2f..%2f..%2fetc%2fpasswd", "/static/../app.py", "/.git/config",
    "/v1/videos/' OR 1=1 --", "/v1/videos?after=' OR 1=1 --", "/v1/videos/{{7*7}}/recipe",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_paths_lead_to_nothing(app: Application, path: str) -> None:
    refused(app.ask("GET", path), 404)


FIELDS = [
    {"image": "/etc/passwd"}, {"image": "files/../queue.sqlite"}, {"extend": "file:///etc/passwd"},
    {"edit": "http://169.254.169.254/latest/meta-data"}, {"edit": "\\\\host\\share\\a.mp4"},
    {"reference_path": "https://example.com/a.png;/etc/passwd", "mask_strategy": "0"},
    {"image": {"image_url": "ftp://a"}},
    {"input_reference": "data:image/png;base64,!!!"}, {"image": "data:text/html;base64,PHNjcmlwdD4="},
    {"prompt": 'a wave.{"reference_path": "/etc/passwd", "mask_strategy": "0"}'},
    {"prompt": 'a wave.{"reference_path": "http://127.0.0.1:22/", "mask_strategy": "0"}'},
    {"save_dir": "/tmp"}, {"output": "/tmp/a.png"}, {"prompt_path": "/etc/passwd"}, {"device": "cuda:7"},
    {"llm_refine": True, "llm_base_url": "http://127.0.0.1:22"}, {"ckpt_path": "/etc"},
    {"cfg_options": "model.depth=1"},
    {"allow_downloads": True}, {"cache_table": {}}, {"model": "../../etc/passwd"}, {"model": {"type": "STDiT3"}},
    {"num_sample": 100_000}, {"batch_size": 10_000}, {"steps": 10**9}, {"steps": 501}, {"num_frames": 10**9},
    {"size": "99999999x8"}, {"size": "16000x16000", "num_frames": 17}, {"loop": 1_000, "num_frames": 102},
    {"size": "0x0"}, {"seed": 10**400}, {"seed": [1, 2]}, {"prompt": "x" * 30_000}, {"prompt": "a\0b"},
    {"prompt": ["a", "b"]}, {"prompt": ""},
    {"prompt": "\ud800 circle"}, {"watermark": "x" * 50_000}, {"__class__": "x"}, {"fps": {"a": 1}},
    {"keep": "1s", "strength": 1}, {"image": "video_000000000000000000000000"}, {"resolution": "9" * 500},
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: str(fields)[:60])
def test_fields_reach_no_file_address_or_device(app: Application, fields: dict) -> None:
    before = app.state.store.counts()
    for path in ("/v1/videos", "/v1/videos/plan"):
        answer = app.post(path, {**SMALL, **fields})
        refused(answer, 400, 404)
        assert "\n" not in answer.error["message"] and "root:" not in answer.error["message"]
    assert app.state.store.counts() == before


BODIES: dict[str, tuple[tuple[str, str], bytes, int]] = {
    "deep": (JSON, b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 400),
    "large": (JSON, b'{"prompt":"' + b"a" * 200_000 + b'"}', 413),
    "not UTF-8": (JSON, b'{"prompt":"\xff\xfe"}', 400),
    "infinite": (JSON, b'{"prompt":"a","aes":1e999,"flow":Infinity}', 400),
    "long number": (JSON, b'{"prompt":"a","seed":' + b"9" * 60_000 + b"}", 400),
    "a list": (JSON, b"[1, 2]", 400),
    "text": (("content-type", "text/plain"), b'{"prompt":"a"}', 415),
    "no type": (("x-none", "1"), b'{"prompt":"a"}', 415),
    "no boundary": (("content-type", "multipart/form-data"), b"a", 400),
    "broken form": (FORM, b"--" + BOUNDARY.encode() + b"\r\nContent-Disposition: nothing\r\n\r\na\r\n", 400),
    "many fields": (FORM, form_body(*((f"f{n}", b"1") for n in range(2_000))), 400),
    "many files": (FORM, form_body(*(("image", PNG, "a.png") for _ in range(40))), 400),
    "strange names": (FORM, form_body(("pro\x01mpt", b"a")), 400),
    "large form": (FORM, form_body(("prompt", b"a"), ("image", b"a" * 500_000, "a.png")), 413),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_are_bounded(app: Application, name: str) -> None:
    kind, body, status = BODIES[name]
    begin = time.process_time()
    refused(app.ask("POST", "/v1/videos", kind, body=body), status)
    assert time.process_time() - begin < 5


def test_a_body_without_a_length_is_bounded_too(app: Application) -> None:
    refused(app.ask("POST", "/v1/videos", JSON, body=[b"a" * 50_000] * 10), 413)


def test_a_slow_body_is_given_up(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "RECEIVE_SECONDS", 0.1)
    refused(app.ask("POST", "/v1/videos", JSON, body=[b"{", b"}"], pause=1.0), 408)
    refused(app.ask("POST", "/v1/videos", JSON, body=[b" "] * 100, pause=0.05), 408)


def png_bomb() -> bytes:
    """A PNG that says it has a billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 32_000, 32_000, 8, 2, 0, 0, 0)
    return PNG + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def long_video(folder: Path) -> bytes:
    return write_video(np.zeros((100, 16, 16, 3), np.uint8), folder / "long.mp4", 24).read_bytes()


def whole_image(folder: Path) -> bytes:
    encode_image(np.zeros((16, 16, 3), np.uint8), folder / "whole.png")
    return (folder / "whole.png").read_bytes()


MEDIA: dict[str, Callable[[Path], bytes]] = {
    "nothing": lambda folder: b"",
    "a page": lambda folder: b"<html><script>alert(1)</script>",
    "a picture that is a program": lambda folder: b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
    "a playlist": lambda folder: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "a script for ffmpeg": lambda folder: b"ffconcat version 1.0\nfile /etc/passwd\n",
    "an archive": lambda folder: b"PK\x03\x04" + b"0" * 100,
    "a broken picture": lambda folder: PNG + b"0" * 1_000,
    "a huge picture": lambda folder: png_bomb(),
    "a broken video": lambda folder: b"\0\0\0\x18ftypmp42" + b"\xff" * 2_000,
    "half a video": lambda folder: long_video(folder)[:-800],
    "a long video": long_video,
}


@pytest.mark.parametrize("name", MEDIA)
def test_hostile_media_are_refused_and_not_kept(app: Application, tmp_path: Path, name: str) -> None:
    content = MEDIA[name](tmp_path)
    refused(app.form("/v1/files", ("file", content, "../../../a.png")))
    refused(app.form("/v1/videos", ("prompt", b"a circle"), ("image", content, "a.png")))
    files = app.state.store.folder / "files"
    assert not app.state.store.files() and not (files.is_dir() and list(files.iterdir()))


def test_names_of_files_are_never_paths(app: Application, tmp_path: Path) -> None:
    content = whole_image(tmp_path)
    for name in ("../../../../tmp/a.png", "/etc/cron.d/a", "C:\\a.png", "a\u202egnp.exe", "..%2fa", "x" * 3_000, "con"):
        stored = json.loads(app.form("/v1/files", ("file", content, name)).body)
        file = app.state.store.file(stored["id"])
        assert file.path == f"files/{stored['id']}.png" and (app.state.store.folder / file.path).is_file()
        answer = app.ask("GET", f"/v1/files/{stored['id']}/content")
        assert answer.headers["content-disposition"] == f'inline; filename="{stored["id"]}.png"'
        assert app.ask("DELETE", f"/v1/files/{stored['id']}").status == 200


KEYS: list[tuple[tuple[str, str | bytes], ...]] = [
    (), (("authorization", "Bearer "),), (("authorization", "Bearer wrong-key-entirely"),),
    (("authorization", f"Basic {KEY}"),), (("authorization", KEY),), (("authorization", f"Bearer {KEY[:-1]}"),),
    (("authorization", b"Bearer \xff\xfe"),), (("authorization", f"Bearer {KEY}\0"),), (("x-api-key", KEY),),
    (("cookie", f"key={KEY}"),), (("authorization", "Bearer " + "a" * 100_000),),
]  # fmt: skip


@pytest.mark.parametrize("headers", KEYS, ids=lambda headers: str(headers)[:40])
def test_only_keys_open_the_interface(locked: Application, headers: tuple[tuple[str, str], ...]) -> None:
    for path in ("/v1/videos", "/v1/models", "/metrics", f"/v1/videos?api_key={KEY}", "/v1/videos/events"):
        refused(locked.ask("GET", path, *headers), 401)


def test_one_key_does_not_see_the_jobs_of_another(locked: Application) -> None:
    mine, others = (("authorization", f"Bearer {key}") for key in (KEY, "another-key"))
    job = json.loads(locked.post("/v1/videos", SMALL, mine).body)
    for method, path in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", "")):
        refused(locked.ask(method, f"/v1/videos/{job['id']}{path}", others), 404)
    refused(locked.post("/v1/videos", {**SMALL, "extend": job["id"]}, others), 404)
    assert json.loads(locked.ask("GET", "/v1/videos", others).body)["data"] == []
    assert json.loads(locked.ask("GET", f"/v1/videos/{job['id']}", mine).body)["status"] == "queued"


SITES = [
    (("origin", "http://evil.example"),), (("origin", "null"),), (("origin", "http://localhost:9000"),),
    (("sec-fetch-site", "cross-site"),), (("sec-fetch-site", "same-site"),), (("host", "evil.example"),),
    (("host", "localhost.evil.example:8000"),), (("host", "127.0.0.1:8000@evil.example"),), (("host", ""),),
    (("host", "localhost"), ("host", "evil.example")), (("host", "-absent-"),),
    (("host", "evil.example"), ("x-forwarded-host", "localhost")),
]  # fmt: skip


@pytest.mark.parametrize("headers", SITES, ids=str)
def test_other_sites_and_foreign_names_are_refused(app: Application, headers: tuple[tuple[str, str], ...]) -> None:
    refused(app.ask("POST", "/v1/videos", FORM, *headers, body=form_body(("prompt", b"a circle"))), 400, 403)
    refused(app.ask("GET", "/v1/videos", *headers), 400, 403)


@pytest.mark.parametrize("length", ["-1", "9" * 30, "1e3", "0x10", "1,2", ""])
def test_lengths_are_numbers(app: Application, length: str) -> None:
    refused(app.ask("POST", "/v1/videos", JSON, ("content-length", length), body=b"{}"), 400, 413)


def test_markup_in_a_prompt_stays_text(app: Application) -> None:
    prompt = "<script>alert(1)</script> a circle\" onload='x'"
    answer = app.post("/v1/videos", {**SMALL, "prompt": prompt})
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    job = json.loads(answer.body)
    assert job["prompt"] == prompt and "'unsafe" not in answer.headers["content-security-policy"]
    assert app.ask("DELETE", f"/v1/videos/{job['id']}").status == 200


def test_five_hundred_event_streams_are_bounded(app: Application) -> None:
    limits = app.state.limits

    async def open_all() -> list[Answer]:
        """The answers that end at once; the other streams stay open until they are cancelled."""
        streams = {asyncio.create_task(app.request("GET", "/v1/videos/events")) for _ in range(500)}
        ended: list[Answer] = []
        while len(streams) > limits.max_streams_per_key:
            done, streams = await asyncio.wait(streams, return_when=asyncio.FIRST_COMPLETED)
            ended += [task.result() for task in done]
        assert len(app.state.events) == limits.max_streams_per_key == len(streams)
        for stream in streams:
            stream.cancel()
        await asyncio.wait(streams)
        return ended

    turned_away = asyncio.run(open_all())
    assert {answer.status for answer in turned_away} == {429}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in turned_away)
    assert len(app.state.events) == 0 and app.ask("GET", "/health").status == 200


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server in a thread of this process, with little patience."""
    connection.HEAD_SECONDS = 0.5
    app = Application(tmp_path_factory.mktemp("listening") / "data", limits=LIMITS)
    listener = socket.create_server(("127.0.0.1", 0))
    program = uvicorn.Server(server.configuration(app.app, lifespan="off"))
    thread = threading.Thread(target=program.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    program.should_exit = True
    thread.join(10)
    connection.HEAD_SECONDS = 20.0


def talk(port: int, data: bytes, seconds: float = 60.0) -> bytes:
    """What a server says to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        said = b""
        with suppress(ConnectionError):  # closed while we still send
            client.sendall(data)
            while piece := client.recv(65_536):
                said += piece
        return said


CONVERSATIONS: dict[str, tuple[bytes, bytes]] = {
    "silence": (b"", b""),
    "half a head": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b""),
    "another protocol": (b"\x16\x03\x01\x02\x00\x01\x00", b"HTTP/1.1 400"),
    "a huge header": (b"GET /health HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n", b""),
    "two lengths": (
        b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"HTTP/1.1 400",
    ),
    "an absolute address": (
        b"GET http://evil.example/v1/videos HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 403",
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_connections_are_bounded(listening: int, name: str) -> None:
    data, said = CONVERSATIONS[name]
    assert talk(listening, data).startswith(said)
    ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert b'"status":"ok"' in talk(listening, ask)


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    app = Application(tmp_path / "data", [KEY, "another-key"], Limits(max_queued=3, max_queued_per_key=2))
    mine, others = (("authorization", f"Bearer {key}") for key in (KEY, "another-key"))
    assert [app.post("/v1/videos", SMALL, mine).status for _ in range(3)] == [200, 200, 429]
    assert app.post("/v1/videos", SMALL, others).status == 200
    full = app.post("/v1/videos", SMALL, others)
    refused(full, 429)
    assert 1 <= int(full.headers["retry-after"]) <= 3_600 and full.error["type"] == "rate_limit_error"


@pytest.mark.parametrize("port", [-1, 65_536, 99_999])
def test_a_port_beyond_the_last_one_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match="--port is"):
        server._listen("127.0.0.1", port)
