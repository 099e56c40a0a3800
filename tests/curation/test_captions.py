"""Stage captions against a stand-in for a server: what it is asked, and what becomes of every kind of answer."""

from __future__ import annotations

import base64
import csv
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opensora.curation.curate import CurationReport, CurationSettings, curate
from opensora.curation.execution.gate import MAX_FAILURES
from opensora.curation.execution.ledger import open_ledger
from opensora.curation.execution.settings import ExecutorSettings
from opensora.datasets.video import write_image
from opensora.errors import ConfigError, MediaError
from opensora.remote.retries import seconds_to_wait
from tests.chat_server import Server, drips, hangs_up, says, sends, silent
from tests.curation.footage import footage

KEY = "sk-very-secret-0123"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def settings(server: Server, tmp_path: Path) -> CurationSettings:
    options = {"url": server.url, "model": "sees", "pause": 0, "seconds": 60, "tries": 3}
    return CurationSettings(
        str(tmp_path / "in"), str(tmp_path / "out.csv"), ("captions",), {"captions": options},
        executor=ExecutorSettings(workers=0), force=True,
    )  # fmt: skip


def pictures(settings: CurationSettings, count: int) -> None:
    Path(settings.source).mkdir(exist_ok=True)
    for number in range(count):
        write_image(np.full((16, 16, 3), number, np.uint8), Path(settings.source) / f"{number:02}.png")


def with_options(settings: CurationSettings, **options: Any) -> CurationSettings:
    return replace(settings, options={"captions": {**settings.options["captions"], **options}})


def texts(settings: CurationSettings) -> list[str]:
    with open(settings.target, newline="", encoding="utf-8") as file:
        return [row["text"] for row in csv.DictReader(file)]


def errors(settings: CurationSettings) -> list[str]:
    lines = Path(f"{settings.target}.quarantine.jsonl").read_text().splitlines()
    return [json.loads(line)["error"] for line in lines]


def test_what_is_asked_and_kept(settings: CurationSettings, server: Server, tmp_path: Path) -> None:
    """Frames as JPEG, in order; the caption refined, with the camera motion. Cells choose no server and no model."""
    video = footage(tmp_path / "a.mp4", (12,))
    table = tmp_path / "in.csv"
    table.write_text(f"path,cmotion,url,model,OPENAI_API_KEY\n{video},pan left,http://127.0.0.1:9/v1,other,other\n")
    settings = with_options(replace(settings, source=str(table)), frames=3, side=80)
    server.answers = [says("The video shows a red\n\x1b[31m\u202esquare.")]
    curate(settings)
    assert texts(settings) == ["A red [31msquare. camera motion: pan left."]
    [(path, headers, body)] = server.asked
    asked = json.loads(body)
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert asked["model"] == "sees" and asked["max_tokens"] == 300
    words, *images = asked["messages"][0]["content"]
    assert "at most 120 words" in words["text"] and len(images) == 3
    for image in images:
        kind, _, data = image["image_url"]["url"].partition(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (80, 48)
    with open_ledger(f"{settings.target}.ledger") as ledger:
        [tool] = ledger.tools().values()
    assert tool["settings"]["model"] == "sees" and "120 words" in tool["settings"]["prompt"]
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir() if file.is_file() and file != video)
    assert KEY.encode() not in kept and server.url.encode() not in kept


def test_only_another_question_is_asked_again(settings: CurationSettings, server: Server) -> None:
    pictures(settings, 2)
    server.answers = [says("The image shows a cat.")]
    assert curate(settings) == CurationReport(2, 0, 2)
    assert curate(with_options(settings, tries=2, concurrency=1)).computed == 0
    assert curate(with_options(settings, refine=False)).computed == 0
    assert texts(settings) == ["The image shows a cat."] * 2 and len(server.asked) == 2
    assert curate(with_options(settings, prompt="What is it?")).computed == 2


WRONG = [
    (sends("{"), "is not a chat completion"),
    (sends("<html><body>Bad gateway</body></html>"), "is not a chat completion"),
    (sends("[" * 90_000), "is not a chat completion"),
    (sends(" " * 1_100_000), "is not a chat completion"),
    (sends(json.dumps({"choices": [{"message": {"content": {"a": 1}}}]})), "is not a chat completion"),
    (sends(json.dumps({"choices": [{"message": {"content": "A"}, "finish_reason": "length"}]})), "is cut off"),
    (says("word " * 1_000), "more than 4,000 characters"),
    (says(None), "is empty"),
    (says("\x00\x1b\u202e"), "is empty"),
    (sends("no such parameter", 400), "server answers 400"),
]


def test_wrong_answers_are_quarantined_by_name(settings: CurationSettings, server: Server) -> None:
    pictures(settings, len(WRONG) + 2)
    server.answers = [says("A dog."), *(answer for answer, _ in WRONG), says("A cat.")]
    assert curate(settings) == CurationReport(2, len(WRONG), len(WRONG) + 2)
    assert texts(settings) == ["A dog.", "A cat."] and len(server.asked) == len(WRONG) + 2
    for number, ((_, reason), error) in enumerate(zip(WRONG, errors(settings), strict=True), start=1):
        assert f"{number:02}.png: " in error and reason in error
    server.answers = [says("A cat.")]
    assert curate(settings).computed == 0
    assert curate(replace(settings, retry_errors=True)) == CurationReport(len(WRONG) + 2, 0, len(WRONG))


def test_a_busy_server_is_asked_again(settings: CurationSettings, server: Server) -> None:
    pictures(settings, 1)
    busy = [sends("", 429, **{"Retry-After": "0"}), sends("", 503), hangs_up, sends("", 500)]
    server.answers = [*busy, says("A cat.")]
    assert curate(with_options(settings, tries=5)) == CurationReport(1, 0, 1)
    assert texts(settings) == ["A cat."] and len(server.asked) == 5


def test_a_slow_server_is_asked_again_and_given_up(settings: CurationSettings, server: Server) -> None:
    pictures(settings, 1)
    server.answers = [silent, drips]
    with pytest.raises(MediaError, match=r"no answer within 0 s.*, asked 2 times"):
        curate(with_options(settings, tries=2, seconds=0.4))
    assert len(server.asked) == 2


def test_the_server_says_how_long_to_wait(settings: CurationSettings, server: Server) -> None:
    pictures(settings, 1)
    server.answers = [sends("", 429, **{"Retry-After": "1"}), says("A cat.")]
    began = time.monotonic()
    curate(settings)
    assert time.monotonic() - began >= 1 and len(server.asked) == 2


@pytest.mark.parametrize(("answer", "asked"), [(None, 0), (sends("", 401), 1), (sends("", 302, Location="/x"), 1)])
def test_a_server_that_is_down_costs_nothing(
    settings: CurationSettings, server: Server, answer: Any, asked: int
) -> None:
    """The run stops asking; nothing is stored, so that the next run asks for every clip."""
    pictures(settings, MAX_FAILURES + 3)
    down = settings
    if answer is None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        down = with_options(settings, url=url)
    else:
        server.answers = [answer]
    with pytest.raises(MediaError, match=f"none of {MAX_FAILURES + 3} items can be used; the first: .*00.png"):
        curate(down)
    assert len(server.asked) == MAX_FAILURES * asked
    server.answers = [says("A cat.")]
    assert curate(settings) == CurationReport(MAX_FAILURES + 3, 0, MAX_FAILURES + 3)


def test_one_failure_of_the_server_is_named(settings: CurationSettings, server: Server) -> None:
    pictures(settings, 3)
    server.answers = [says("A dog."), *[sends("", 503)] * 3, says("A cat.")]
    assert curate(settings) == CurationReport(2, 1, 3)
    assert errors(settings) == [f"{settings.source}/01.png: the language model's server answers 503, asked 3 times"]
    assert curate(settings) == CurationReport(3, 0, 1)


def test_the_budget(settings: CurationSettings, server: Server) -> None:
    pictures(settings, 5)
    few = with_options(settings, max_requests=2)
    assert curate(few) == CurationReport(2, 3, 2) and len(server.asked) == 2
    assert all("captions takes 2 clips in a run; run again" in error for error in errors(few))
    assert curate(few) == CurationReport(4, 1, 2) and curate(few) == CurationReport(5, 0, 1)


def test_requests_run_at_once(settings: CurationSettings, server: Server) -> None:
    """As many as `concurrency` allows: the server answers none before two have come."""
    both = threading.Barrier(2, timeout=60)

    def together(handler: BaseHTTPRequestHandler) -> None:
        both.wait()
        says("A cat.")(handler)

    pictures(settings, 4)
    server.answers = [together]
    together_settings = with_options(settings, concurrency=2, seconds=60)
    assert curate(replace(together_settings, executor=ExecutorSettings(workers=8))).rows == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": None}, "captions.url=http"), ({"model": ""}, "captions.model=NAME"),
        ({"frames": 0}, "captions.frames must be 1 to 64"), ({"tries": 0}, "captions.tries must be 1 to 20"),
        ({"url": "file:///etc/passwd"}, "is not valid"),
        ({"concurrency": 1000}, "captions.concurrency"), ({"max_requests": -1}, "captions.max_requests"),
    ],
)  # fmt: skip
def test_what_is_refused_at_once(settings: CurationSettings, options: dict[str, Any], words: str) -> None:
    pictures(settings, 1)
    with pytest.raises(ConfigError, match=words):
        curate(with_options(settings, **options))


def test_the_key_is_from_the_environment_alone(settings: CurationSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(settings, 1)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="set OPENAI_API_KEY"):
        curate(settings)
    with pytest.raises(ConfigError, match="no setting 'key'"):
        curate(with_options(settings, key="x"))


def test_what_a_server_asks_to_wait() -> None:
    assert seconds_to_wait("7") == 7 and seconds_to_wait(None) is None and seconds_to_wait("soon") is None
    assert seconds_to_wait("-1") is None and seconds_to_wait("9" * 5000) == 999_999_999
    later = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)
    assert 25 < (seconds_to_wait(later) or 0) <= 30
    assert seconds_to_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0
