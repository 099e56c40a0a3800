"""`--device cuda:1`: that device becomes the current one, and whoever waits, measures or records asks it."""

from __future__ import annotations

import threading

import torch

from opensora.acceleration import device as devices
from opensora.acceleration.streams import is_asynchronous, read_async
from tests.fake_cuda.machine import FakeMachine

SECOND = torch.device("cuda:1")


def test_it_becomes_the_current_device(machine: FakeMachine) -> None:
    with machine.running():
        assert devices.pick_device("cuda:1") == SECOND
    assert machine.current == 1


def test_it_is_the_one_that_is_waited_for_and_measured(machine: FakeMachine) -> None:
    devices.synchronize(SECOND)
    devices.reset_peak_memory(SECOND)
    assert devices.peak_memory(SECOND) == 2**20 and devices.device_name(SECOND) == "made-up"
    assert {device for _, device in machine.calls} == {"cuda:1"}


def test_the_loss_is_read_after_its_own_copy(machine: FakeMachine) -> None:
    """In any thread: the current device is that of the thread."""

    def launch() -> None:
        with machine.running():
            read_async(torch.zeros(3, device=SECOND))

    launch()
    assert machine.recorded == 1 and machine.current == 0
    recorded: list[int] = []
    thread = threading.Thread(target=lambda: (launch(), recorded.append(machine.recorded)))
    thread.start()
    thread.join()
    assert recorded == [1]
    assert is_asynchronous(SECOND) and not machine.waits


def test_a_pipeline_keeps_its_device_when_another_becomes_current(machine: FakeMachine) -> None:
    own = devices.with_index(torch.device("cuda"))
    with machine.running():
        devices.pick_device("cuda:1")
    assert own == torch.device("cuda:0") and devices.with_index(torch.device("cuda")) == SECOND


def test_each_rank_has_its_own(machine: FakeMachine) -> None:
    assert devices.set_device(torch.device("cuda"), 1) == SECOND
    assert machine.current == 1
