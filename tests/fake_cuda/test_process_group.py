"""The process group of ranks with a device each: bound to it, with a time limit, and with gloo for the host."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opensora.acceleration.device import set_device
from opensora.distributed.process_group import connect
from opensora.distributed.ranks import Ranks
from tests.fake_cuda.machine import FakeMachine


@pytest.mark.parametrize(
    ("kind", "backend", "device"), [("cuda", "cpu:gloo,cuda:nccl", torch.device("cuda:1")), ("cpu", "gloo", None)]
)
def test_ranks_are_bound_to_their_devices(
    kind: str, backend: str, device: torch.device | None, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.update(options, backend=backend))
    connect(set_device(torch.device(kind), 1), Ranks(1, 2, 1), timeout=60)
    limit = timedelta(seconds=60)
    assert asked == {"backend": backend, "rank": 1, "world_size": 2, "timeout": limit, "device_id": device}
