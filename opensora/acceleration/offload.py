"""Offloading: weights stay on the host and are on the device only while they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from opensora.acceleration.device import HOST, is_cpu
from opensora.acceleration.model_parts import blocks_of


class OffloadedModule:
    """The host copy of a module's weights, which moves to a device and back; holds no reference to the module."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        self.host_state = {name: tensor.to(HOST) for name, tensor in module.state_dict().items()}
        self.offload(module)

    def onload(self, module: nn.Module, *_: Any) -> None:
        """Copies the weights to the device."""
        module.to(self.device)

    def offload(self, module: nn.Module, *_: Any) -> None:
        """Drops the device's weights, which nothing has changed, for those on the host."""
        module.load_state_dict(self.host_state, assign=True)

    @contextmanager
    def onloaded(self, module: nn.Module) -> Iterator[None]:
        """Within it the weights are on the device."""
        self.onload(module)
        try:
            yield
        finally:
            self.offload(module)


class Offloader:
    """Offloads the named models of a pipeline; does nothing unless `enabled` and the device is an accelerator."""

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.device = device
        self.enabled = enabled and not is_cpu(device)
        self.modules: dict[str, tuple[OffloadedModule, nn.Module]] = {}

    def offload(self, name: str, module: nn.Module) -> None:
        """Moves the weights of a model on the device to the host."""
        if self.enabled:
            self.modules[name] = OffloadedModule(module, self.device), module

    def onloaded(self, name: str) -> AbstractContextManager[None]:
        """Within it the weights of a model are on the device."""
        if name not in self.modules:
            return nullcontext()
        offloaded, module = self.modules[name]
        return offloaded.onloaded(module)


def offload_blocks(model: nn.Module, device: torch.device) -> None:
    """Moves a transformer to `device`, except for its blocks: each is on the device only while it runs."""
    blocks = blocks_of(model)
    inside = {part for block in blocks for part in block.modules()}
    for module in model.modules():
        if module not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    for block in blocks:
        offloaded = OffloadedModule(block, device)
        block.register_forward_pre_hook(offloaded.onload)
        block.register_forward_hook(offloaded.offload)
