"""One server for all tests that need a real one: its processes take seconds to start."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.serving.programs import KEY, OTHER, ServerProgram


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProgram]:
    folder = tmp_path_factory.mktemp("serving") / "data"
    server = ServerProgram(folder, "--devices", "cpu", "--api-key", KEY, "--api-key", OTHER).start()
    yield server
    server.stop()


@pytest.fixture
def web(server: ServerProgram) -> Iterator[httpx.Client]:
    with server.client() as web:
        yield web
