"""Prompts that the language model of the server rewrites: offered only by a server that has one, and bounded."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from opensora.cli import main
from opensora.pipeline import prompt_refiner
from opensora.remote.chat import Endpoint
from opensora.serving import language_model as module
from opensora.serving.channel import Message
from opensora.serving.process import WorkerProcess
from tests.chat_server import Server, hangs_up, says, sends
from tests.serving.asgi import JSON, Application

KEY = "sk-very-secret-0123"
PATH = "/v1/prompts/refine"


@pytest.fixture
def language_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(prompt_refiner, "PAUSE", 0.0)
        yield running
        running.shutdown()


@pytest.fixture
def application(language_model: Server, tmp_path: Path) -> Application:
    return Application(tmp_path / "data", language_model=Endpoint(urlsplit(language_model.url), "some-model", KEY))


def test_a_prompt_is_refined(application: Application, language_model: Server) -> None:
    answer = application.post(PATH, {"prompt": "a cat"})
    assert (answer.status, json.loads(answer.body)) == (200, {"object": "prompt", "prompt": "A Small Cat."})
    assert language_model.texts == ["a cat"] and KEY.encode() not in answer.body
    [model] = json.loads(application.ask("GET", "/v1/models").body)["data"]
    assert model["refines_prompts"] is True


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (sends("no", 401), "server answers 401"),
        (sends("no", 500), "server answers 500"),
        (says(""), "answer is empty"),
        (says("word " * 10_000), "more than 10,000 characters"),
        (sends("<html>"), "not a chat completion"),
        (hangs_up, "cannot be reached"),
    ],
)
def test_a_language_model_that_fails(
    application: Application, language_model: Server, answer: object, told: str
) -> None:
    language_model.answers = [answer]  # type: ignore[list-item]
    refused = application.post(PATH, {"prompt": "a cat"})
    assert (refused.status, refused.error["type"], refused.error["code"]) == (
        502,
        "server_error",
        "language_model_failed",
    )
    assert told in refused.error["message"]
    assert not any(secret in refused.body.decode() for secret in (KEY, language_model.url, "some-model"))


@pytest.mark.parametrize("prompt", [None, "", "  ", 3, ["a cat"], "a" * 4_001])
def test_wrong_prompts_are_not_sent(application: Application, language_model: Server, prompt: object) -> None:
    refused = application.post(PATH, {"prompt": prompt})
    assert (refused.status, refused.error["param"]) == (400, "prompt") and not language_model.asked


def test_few_are_refined_at_once(
    application: Application, language_model: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the clients have left: the language model is still asked."""
    monkeypatch.setattr(module, "MAX_REQUESTS", 2)
    asked, go = threading.Semaphore(0), threading.Event()

    def waits(handler: object) -> None:
        asked.release()
        go.wait(60)
        says("A Small Cat.")(handler)  # type: ignore[arg-type]

    language_model.answers = [waits]  # type: ignore[list-item]

    async def work() -> list[int]:
        def ask() -> asyncio.Task:
            return asyncio.create_task(application.request("POST", PATH, JSON, body=b'{"prompt": "a cat"}'))

        first, left = ask(), ask()
        for _ in range(2):
            await asyncio.to_thread(asked.acquire)
        left.cancel()
        statuses = [(await ask()).status]
        go.set()
        statuses.append((await first).status)
        while application.state.refiner._running:  # type: ignore[union-attr]
            await asyncio.sleep(0.01)
        return [*statuses, (await ask()).status]

    assert asyncio.run(work()) == [429, 200, 200]


def test_a_server_without_a_language_model(tmp_path: Path) -> None:
    application = Application(tmp_path / "data")
    assert application.post(PATH, {"prompt": "a cat"}).status == 404
    [model] = json.loads(application.ask("GET", "/v1/models").body)["data"]
    assert model["refines_prompts"] is False


def test_what_the_command_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert main(["serve", "--llm-refine"]) == 1
    assert "set OPENAI_BASE_URL, OPENAI_MODEL, OPENAI_API_KEY" in capsys.readouterr().err
    assert main(["serve", "--llm-model", "some-model"]) == 1
    assert "give --llm-refine with them" in capsys.readouterr().err


def test_workers_have_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tells_environment.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "of-the-worker")
    for name in ("OPENAI_API_KEY", "OPENSORA_API_KEY"):
        monkeypatch.setenv(name, KEY)

    async def environment() -> Message | None:
        worker = WorkerProcess("tells_environment")
        await worker.start()
        try:
            return await worker.receive(60)
        finally:
            await worker.kill()

    found = asyncio.run(environment()) or {}
    assert found["HF_TOKEN"] == "of-the-worker" and KEY not in found.values()
