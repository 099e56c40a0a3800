"""A Ray cluster of this machine for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ATTEMPTS = 5  # Ray gives a node 30 s to start, which a loaded machine may miss
ROOT = Path(__file__).parents[1]


@contextmanager
def ray_cluster(num_cpus: int) -> Iterator[Any]:
    """The module `ray`, connected to a new cluster."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        for attempt in range(ATTEMPTS):
            try:
                ray.init("local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False,
                         object_store_memory=10**8)  # fmt: skip
                break
            except Exception as error:
                ray.shutdown()
                if "timed out during startup" not in str(error) or attempt + 1 == ATTEMPTS:
                    raise
        try:
            yield ray
        finally:
            ray.shutdown()
