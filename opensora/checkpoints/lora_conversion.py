"""Converts adapters between the layouts of LoRA files."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from opensora.checkpoints import builder
from opensora.checkpoints.conversion import ANY_SIZE, model_section
from opensora.checkpoints.hub import locate
from opensora.checkpoints.lora import describe_adapter, read_layers, read_lora, write_lora
from opensora.errors import ConfigError, WeightsError


def convert_adapter(
    source: str, destination: str, to: str, config: str | None = None, force: bool = False, offline: bool = False
) -> str:
    """Writes an adapter as "lora-diffusers", "lora-comfyui" or "lora-kohya" (a file), or "lora-peft" (a folder).

    With `config` it must fit that model; files of kohya need it. Tensors, alphas and metadata stay as they are. Returns
    a description. Raises ConfigError or WeightsError without writing anything.
    """
    target, layout = Path(destination), to.removeprefix("lora-")
    if (target.suffix == ".safetensors") == (layout == "peft"):
        raise ConfigError(f"{target}: --to {to} writes {'a folder' if layout == 'peft' else 'a .safetensors file'}")
    if target.exists() and (not force or target.is_dir() != (layout == "peft")):
        raise ConfigError(f"{target} exists; choose another path{'' if force else ', or replace it with --force'}")
    path = locate(source, offline=offline)
    write_lora(target, read_lora(path, _model(config)) if config else read_layers(path), layout)
    return describe_adapter(target)


def _model(config: str) -> nn.Module:
    """The model of a configuration on the meta device; its sizes are those of its weights, if they are here."""
    section = model_section(config)
    try:
        path = builder.find_weights(section, "model", offline=True)
    except (ConfigError, WeightsError):
        path = None
    return builder.build_model({key: value for key, value in section.items() if key != "strict"}, path, ANY_SIZE)
