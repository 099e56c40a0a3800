"""What many tests need: a hub cache filled with tiny checkpoints, and no way to the network."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores; read when torch is imported

import pytest

from tests.checkpoints import make_hub_cache, use_cache
from tests.full import left_out


@pytest.fixture(scope="session")
def filled_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache with everything that the 1.2 sample configuration names; copy it before changing it."""
    return make_hub_cache(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session", autouse=True)
def quick_disk() -> Iterator[None]:
    """Files are not forced to disk: no test switches the power off, and waiting takes milliseconds a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def hub_cache(filled_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The filled cache, in use; the hub itself cannot be reached."""
    use_cache(filled_cache, monkeypatch)
    return filled_cache


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """What collection makes stays: looking for garbage in it takes a third of its time, and some of each test's."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What shares a server of processes comes first: stolen from the end of a worker's, it would start another."""
    if left := set(left_out(items)):
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=list(left))
    items.sort(key=lambda item: ("wrong_inputs" not in item.nodeid, not forks(item)))


def forks(item: pytest.Item) -> bool:
    """Whether the module of a test uses the server of processes of tests/ranks.py, by tests/killing.py or itself."""
    used = vars(item.module).values()
    return any(
        getattr(one, "__module__", None) == "tests.ranks" or one is sys.modules.get("tests.killing") for one in used
    )


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Iterator[Any]:
    """What a worker tells of a test, without the names that are not UTF-8, which it could not send."""
    return sendable((yield))


def sendable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {key: sendable(item) for key, item in value.items()}
    return type(value)(map(sendable, value)) if type(value) in (list, tuple) else value
