"""The fixture `machine`: two CUDA devices that compute nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_cuda.machine import FakeMachine, build_guard


@pytest.fixture(scope="session")
def guard(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device guard, compiled once for a machine, or once for a run without pytest's cache."""
    cache = getattr(pytestconfig, "cache", None)
    return build_guard(tmp_path_factory.mktemp("fake_cuda") if cache is None else cache.mkdir("fake_cuda"))


@pytest.fixture
def machine(guard: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return FakeMachine(guard, monkeypatch)
