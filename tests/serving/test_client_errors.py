"""Each status of the server as the error of OpenAI's client, unchanged, with the message and the fields it promises."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from opensora.serving.dispatcher import Running
from opensora.serving.errors import ApiError
from opensora.serving.limits import Limits
from opensora.serving.process import WorkerProcess
from tests.serving.asgi import Application

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

KEY = "key-of-one-client"
REQUEST: dict[str, Any] = {"prompt": "a red circle", "size": "32x32", "extra_body": {"num_frames": 17, "steps": 3}}
Call = Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, Any]]


def error_of(application: Application, call: Call, **options: Any) -> openai.APIStatusError:
    """What a call raises; without retries, unless `options` of the client ask for them."""

    async def work() -> openai.APIStatusError:
        transport = httpx.ASGITransport(application.app, raise_app_exceptions=False)
        web = httpx.AsyncClient(transport=transport)
        options.setdefault("max_retries", 0)
        given = {"api_key": KEY, "base_url": "http://localhost:8000/v1", **options}
        async with openai.AsyncOpenAI(http_client=web, **given) as client:
            with pytest.raises(openai.APIStatusError) as caught:
                await call(client)
        return caught.value

    return asyncio.run(work())


@pytest.fixture
def application(tmp_path: Path) -> Application:
    return Application(tmp_path / "data", keys=[KEY], limits=Limits(max_queued=2, max_upload=100_000))


def create(**changes: Any) -> Call:
    return lambda client: client.videos.create(**{**REQUEST, **changes})


async def replay_unfinished(client: openai.AsyncOpenAI) -> None:
    video = await client.videos.create(**REQUEST)
    await client.post(f"/videos/{video.id}/replay", cast_to=object)


async def fill_the_queue(client: openai.AsyncOpenAI) -> None:
    for _ in range(3):
        await client.videos.create(**REQUEST)


@pytest.mark.parametrize(
    ("call", "kind", "status", "type", "code"),
    [
        (create(size="big"), openai.BadRequestError, 400, "invalid_request_error", "invalid_value"),
        (create(model="sora-2"), openai.BadRequestError, 400, "invalid_request_error", "model_not_found"),
        (create(extra_headers={"Authorization": "Bearer another"}), openai.AuthenticationError, 401,
         "authentication_error", "invalid_api_key"),
        (create(extra_headers={"Origin": "http://elsewhere.example"}), openai.PermissionDeniedError, 403,
         "permission_error", "cross_site"),
        (lambda client: client.videos.retrieve("video_000000000000000000000000"), openai.NotFoundError, 404,
         "not_found_error", "not_found"),
        (replay_unfinished, openai.ConflictError, 409, "invalid_request_error", "not_ready"),
        (create(input_reference=("a.png", b"0" * 200_000)), openai.APIStatusError, 413, "invalid_request_error",
         "too_large"),
        (fill_the_queue, openai.RateLimitError, 429, "rate_limit_error", "queue_full"),
    ],
)  # fmt: skip
def test_what_a_client_does_wrong(
    application: Application, call: Call, kind: type[openai.APIStatusError], status: int, type: str, code: str
) -> None:
    error = error_of(application, call)
    assert isinstance(error, kind) and (error.status_code, error.type, error.code) == (status, type, code)
    assert error.message and "\n" not in error.message
    assert ("retry-after" in error.response.headers) == (status == 429)


def fails(error: Exception) -> Callable[..., Any]:
    async def ask(**question: Any) -> Any:
        raise error

    return ask


def test_a_fault_of_the_server(application: Application) -> None:
    """The message tells nothing of what happened inside."""
    application.state.planner.ask = fails(RuntimeError("secret of the inside"))  # type: ignore[method-assign]
    error = error_of(application, create())
    assert isinstance(error, openai.InternalServerError) and error.status_code == 500
    assert (error.type, error.code) == ("server_error", "server_error") and "secret" not in str(error.body)


def test_without_a_planner(application: Application) -> None:
    application.state.planner.ask = fails(ApiError(503, "plans cannot be made"))  # type: ignore[method-assign]
    error = error_of(application, create())
    assert isinstance(error, openai.InternalServerError) and (error.status_code, error.type) == (503, "server_error")


def test_without_a_worker(application: Application) -> None:
    """Once a worker has said why it cannot start. Meanwhile /health tells it too, and nothing is queued."""
    application.state.dispatcher.problem = "device 'cuda' is not there"
    error = error_of(application, create())
    assert isinstance(error, openai.InternalServerError) and (error.status_code, error.code) == (503, "no_worker")
    assert "device 'cuda' is not there" in error.message and error.response.headers["retry-after"] == "30"
    assert application.ask("GET", "/health").status == 503
    application.state.dispatcher.ready = 1  # another one can
    assert application.ask("GET", "/health").status == 200
    assert application.state.store.counts() == {}


def test_with_a_full_disk(tmp_path: Path) -> None:
    application = Application(tmp_path / "data", keys=[KEY], limits=Limits(max_disk=-1))
    error = error_of(application, create())
    assert isinstance(error, openai.InternalServerError) and (error.status_code, error.code) == (507, "disk_full")


def test_the_client_asks_again_after_a_fault(application: Application) -> None:
    """It repeats what answers 5xx, on its own, as often as it is told to."""
    asked = []

    async def ask(**question: Any) -> Any:
        asked.append(question)
        raise RuntimeError

    application.state.planner.ask = ask  # type: ignore[method-assign]
    error_of(application, create(), max_retries=1)
    assert len(asked) == 2


def test_a_job_that_its_worker_fails(application: Application) -> None:
    """Polling ends, with a code and a message; the client raises nothing, since the answer is a job."""

    async def work() -> Any:
        web = httpx.AsyncClient(transport=httpx.ASGITransport(application.app))
        async with openai.AsyncOpenAI(http_client=web, api_key=KEY, base_url="http://localhost:8000/v1") as client:
            video = await client.videos.create(**REQUEST)
            job = application.state.store.get(video.id)
            assert job is not None
            application.state.dispatcher.running[job.id] = Running(job, WorkerProcess("none"))
            told = {"code": "server_error", "message": "the worker failed (RuntimeError); its log says more"}
            application.state.dispatcher._take({"type": "failed", "id": job.id, **told})
            return await client.videos.poll(video.id)

    video = asyncio.run(work())
    assert video.status == "failed" and video.error.code == "server_error" and "RuntimeError" in video.error.message
