"""The fixture `machine`: two CUDA devices that compute nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_cuda.machine import FakeMachine, build_guard


@pytest.fixture(scope="session")
def guard(pytestconfig: pytest.Config) -> Path:
    """The device guard, compiled once for a machine."""
    return build_guard(pytestconfig.cache.mkdir("fake_cuda"))


@pytest.fixture
def machine(guard: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return FakeMachine(guard, monkeypatch)
