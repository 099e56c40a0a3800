"""What a training step draws on the host travels to the device without a wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from opensora.schedulers.common import upload
from opensora.schedulers.iddpm import IDDPM
from opensora.schedulers.iddpm_speed import IDDPM_SPEED
from opensora.schedulers.rf import RFLOW
from opensora.training.masks import MaskRatios
from tests.fake_cuda.machine import FakeMachine

DEVICE = torch.device("cuda:0")
SIZE = {"height": 480, "width": 854, "num_frames": 51}


def test_the_machine_notices_waits(machine: FakeMachine) -> None:
    with machine.running():
        there = torch.zeros(2, device=DEVICE)
        torch.zeros(2).to(DEVICE, non_blocking=True)
        torch.zeros(2).pin_memory().to(DEVICE, non_blocking=True)
        there.cpu()
        there.to("cpu", non_blocking=True)
        with pytest.raises(DataDependentOutputException):
            bool(there.any())
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(2)
    assert machine.waits == ["pageable cpu [2] -> cuda:0", "cuda:0 [2] -> cpu"]


@pytest.mark.parametrize("scheduler", [RFLOW(use_timestep_transform=True), IDDPM(), IDDPM_SPEED()], ids=type)
def test_losses(scheduler: Any, machine: FakeMachine) -> None:
    def model(x: Tensor, timestep: Tensor, x_mask: Tensor) -> Tensor:
        assert {x.device, timestep.device, x_mask.device} == {DEVICE}
        return torch.cat([x, x], dim=1)

    generator = torch.Generator().manual_seed(0)
    with machine.running():
        x = torch.zeros(2, 4, 15, 60, 106, device=DEVICE)
        mask = upload(MaskRatios({"random": 1.0}).draw(2, 15, generator), x)
        loss = scheduler.training_loss(model, x, {}, **SIZE, mask=mask, generator=generator)
    assert loss.device == DEVICE and loss.shape == (2,) and not machine.waits
