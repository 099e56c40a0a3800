"""What many tests need: a hub cache filled with tiny checkpoints, and no way to the network."""

from __future__ import annotations

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.checkpoints import make_hub_cache, use_cache


@pytest.fixture(scope="session")
def filled_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache with everything that the 1.2 sample configuration names; copy it before changing it."""
    return make_hub_cache(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub_cache(filled_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The filled cache, in use; the hub itself cannot be reached."""
    use_cache(filled_cache, monkeypatch)
    return filled_cache
