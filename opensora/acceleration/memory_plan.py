"""Memory plans: the same video, to rounding, with less memory at once.

What sees nothing of one another is computed apart: the halves of guidance, frames of the autoencoder, tokens in an
MLP, sequences in attention. What is not needed lies on the host: weights, and frames that were made. A model knows
nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opensora.acceleration.device import place
from opensora.acceleration.kernels.winograd import KINDS, Kinds, forget_winograd
from opensora.acceleration.model_parts import blocks_of
from opensora.models.vae.vae import frames_at_once

TOKENS = 2**13  # that pass through a part of a block at once: as many as still make a good matrix product


@dataclass(frozen=True)
class MemoryPlan:
    """What is done to spare memory."""

    name: str
    sequential_cfg: bool = False  # the guidance branches are evaluated one after the other
    one_by_one: bool = False  # large frames are encoded one at a time
    in_parts: bool = False  # the parts of a block take TOKENS at once
    visiting: bool = False  # weights are on an accelerator only while they are needed
    winograd: Kinds = KINDS  # convolutions for which a CPU keeps kernels for fewer products beside the weights

    def pieces(self, video: Tensor) -> Sequence[Tensor]:
        """A video [..., T, H, W] as what is encoded at once."""
        frames, height, width = video.shape[-3:]
        return video.split(frames_at_once(height, width) if self.one_by_one else frames, dim=-3)

    def arrange(self, model: nn.Module) -> None:
        """Makes a diffusion model compute as planned."""
        if self.in_parts:
            in_parts(model, TOKENS)

    def arrange_vae(self, vae: nn.Module) -> None:
        """Makes an autoencoder compute as planned."""
        if self.winograd != KINDS:
            forget_winograd(vae, but=self.winograd)


FAST, BALANCED, LOW = PLANS = (
    MemoryPlan("fast"),
    MemoryPlan("balanced", sequential_cfg=True, one_by_one=True, winograd=(nn.Conv2d,)),
    MemoryPlan("low", sequential_cfg=True, one_by_one=True, in_parts=True, visiting=True, winograd=()),
)
BY_NAME = {plan.name: plan for plan in PLANS}


def in_parts(model: nn.Module, tokens: int) -> None:
    """Makes the attentions and MLPs of a transformer's blocks take so many tokens at once, where they may.

    Self-attention is split between sequences, attention to text and MLPs between tokens.
    """
    for block in blocks_of(model):
        for name, module in block.named_children():
            if name in ("attn", "attn_temp"):
                module.forward = _Parts(module.forward, tokens)
            elif name == "cross_attn":
                module.forward = _read_once(module, _Parts(module.forward, tokens, axis=1))
            elif name == "mlp":
                module.forward = _by_token(_Parts(module.forward, tokens))


def together(model: nn.Module) -> None:
    """Undoes `in_parts`."""
    for block in blocks_of(model):
        for name, module in block.named_children():
            if name in ("attn", "attn_temp", "cross_attn", "mlp"):
                module.__dict__.pop("forward", None)


class _Parts:
    """`forward` of x, whose output has its shape, some slices along an axis at a time.

    By default that is the first of x [N, L, C], and of x [B, T, S, C] the one along which sequences lie, S.
    """

    def __init__(self, forward: Callable[..., Tensor], tokens: int, axis: int | None = None) -> None:
        self.forward, self.tokens, self.axis = forward, tokens, axis

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        axis = (2 if x.ndim == 4 else 0) if self.axis is None else self.axis
        slices, tokens = x.shape[axis], x.numel() // x.shape[-1]
        step = max(self.tokens * slices // tokens, 1)
        if step >= slices:
            return self.forward(x, *args)
        out = torch.empty_like(x)
        for one, into in zip(x.split(step, axis), out.split(step, axis), strict=True):
            into.copy_(self.forward(one, *args))
        return out


def _by_token(parts: _Parts) -> Callable[[Tensor], Tensor]:
    return lambda x: parts(x.flatten(0, -2)).view(x.shape)


def _read_once(module: nn.Module, parts: _Parts) -> Callable[..., Tensor]:
    return lambda x, y, keep=None: parts(x, module.read(y) if isinstance(y, Tensor) else y, keep)


class Weights:
    """Where the weights of the parts of a request are, under a plan on a device."""

    def __init__(self, plan: MemoryPlan, device: torch.device) -> None:
        self.device = device
        self.visiting = plan.visiting and device.type != torch.empty(0).device.type
        self.guests: dict[str, tuple[Guest, nn.Module]] = {}

    def settle(self, part: str, module: nn.Module) -> None:
        """Sends the weights of a part that was placed on the device away, if the plan has them there no longer."""
        if self.visiting:
            self.guests[part] = Guest(module, self.device), module

    def using(self, part: str) -> AbstractContextManager[Any]:
        """Within it the weights of a part are on the device."""
        if part not in self.guests:
            return nullcontext()
        guest, module = self.guests[part]
        return guest.visit(module)

    def put_text_encoder(self, model: nn.Module, device: torch.device) -> None:
        """Brings a text encoder whose weights are on the host to the device; layer by layer, if the plan has it so."""
        if self.visiting and blocks_of(model):
            by_layers(model, device)
        else:
            place(model, device)


class Guest:
    """The weights of a module, kept on the host, which come to a device and go again; it does not hold the module."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device, host = device, torch.empty(0).device
        self.home = {name: tensor.to(host) for name, tensor in module.state_dict().items()}
        self.leave(module)

    def enter(self, module: nn.Module, *_: Any) -> None:
        """Brings the weights to the device."""
        module.to(self.device)

    def leave(self, module: nn.Module, *_: Any) -> None:
        """Drops what is on the device: nobody has changed it."""
        module.load_state_dict(self.home, assign=True)

    @contextmanager
    def visit(self, module: nn.Module) -> Iterator[None]:
        """Within it the weights are on the device."""
        self.enter(module)
        try:
            yield
        finally:
            self.leave(module)


def by_layers(model: nn.Module, device: torch.device) -> None:
    """Puts a text encoder on a device but for its layers: each comes when it is its turn, and goes after it."""
    layers = blocks_of(model)
    inside = {part for layer in layers for part in layer.modules()}
    for module in model.modules():
        if module not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    for layer in layers:
        guest = Guest(layer, device)
        layer.register_forward_pre_hook(guest.enter)
        layer.register_forward_hook(guest.leave)


@contextmanager
def arranged(model: nn.Module, plan: MemoryPlan) -> Iterator[None]:
    """Within it a model computes as planned."""
    plan.arrange(model)
    try:
        yield
    finally:
        together(model)
