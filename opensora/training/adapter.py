"""Training of an adapter: the base is frozen, and checkpoints hold the adapter alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from opensora.acceleration.model_parts import blocks_of
from opensora.acceleration.precision import DTYPES
from opensora.acceleration.quantization import quantize
from opensora.checkpoints.lora import read_layers
from opensora.checkpoints.summary import Summary
from opensora.config.settings import TrainSettings
from opensora.errors import ConfigError
from opensora.models.layers.linear import PREFIX, AdaptableLinear
from opensora.models.lora import DEFAULT_TARGETS, LoRAConfig, LoRALayer, LoRAWeights, add_adapter, linear_layers

NAME = "default"  # of the adapter in the model
A, B = f".{PREFIX}{NAME}.A", f".{PREFIX}{NAME}.B"


def check(settings: TrainSettings) -> None:
    """Raises ConfigError for settings of an adapter that do not fit together."""
    if settings.lora is None and settings.linear != "exact":
        raise ConfigError(f"linear '{settings.linear}' cannot be trained; it is for the frozen base of lora")
    if settings.lora is not None and not settings.model.get("from_pretrained"):
        raise ConfigError("lora adapts a trained model; give its weights with --ckpt-path")


def add_trained_adapter(model: nn.Module, settings: TrainSettings, base: Summary) -> None:
    """Freezes a loaded model, and adds the adapter of the settings, which is trained in float32.

    The linear layers of its blocks keep the type of the file, or are quantized. Raises ConfigError.
    """
    assert settings.lora is not None
    model.requires_grad_(False)
    if settings.linear != "exact":
        quantize(model, settings.linear)
    elif len(base.dtypes) == 1 and base.dtypes[0] in DTYPES:
        _cast_blocks(model, DTYPES[base.dtypes[0]])
    given = {name: value for name, value in settings.lora.items() if value is not None}
    try:
        add_adapter(model, NAME, LoRAConfig(**{"targets": DEFAULT_TARGETS, **given}))
    except ValueError as error:
        raise ConfigError(f"{error}") from error


def _cast_blocks(model: nn.Module, dtype: torch.dtype) -> None:
    for block in blocks_of(model):
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = layer.weight.data.to(dtype)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that checkpoints and EMA hold: the state dict of the model, or of its adapter if it has one."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name.endswith((A, B))} or state


def adapter_of(model: nn.Module, state: Mapping[str, Tensor], base: str | None) -> LoRAWeights | None:
    """The adapter with the tensors of a `trained_state` of this model; None if the model has none."""
    layers = {
        name: LoRALayer(state[name + A], state[name + B], layer.lora(NAME).alpha)
        for name, layer in linear_layers(model).items() if _is_adapted(layer)
    }  # fmt: skip
    return LoRAWeights(layers, base) if layers else None


def _is_adapted(layer: AdaptableLinear) -> bool:
    return NAME in layer.adapters()


def read_adapter_state(path: str) -> dict[str, Tensor]:
    """The `trained_state` in an adapter file that training wrote. Raises WeightsError."""
    layers = read_layers(path).layers
    return {name + end: tensor for name, one in layers.items() for end, tensor in ((A, one.A), (B, one.B))}
