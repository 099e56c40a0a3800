"""The four layouts of LoRA files: names of keys, and where alpha is.

diffusers: `transformer.MODULE.lora_A.weight`; alpha in the metadata `lora_adapter_metadata`, a JSON configuration
peft: a folder with `adapter_model.safetensors`, `base_model.model.MODULE.lora_A.weight`, and `adapter_config.json`
comfyui: `diffusion_model.MODULE.lora_A.weight` and `.alpha`
kohya: `lora_unet_MODULE.lora_down.weight` and `.alpha`, with `_` for each `.` of a module's name

A is also called `lora_down`, B `lora_up`. Without an alpha it is the rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from opensora.checkpoints.formatting import join_first, shape
from opensora.errors import WeightsError
from opensora.models.lora import LoRALayer

ENDS = {
    ".lora_A.weight": "A", ".lora_down.weight": "A", ".lora_B.weight": "B", ".lora_up.weight": "B", ".alpha": "alpha",
}  # fmt: skip
MAX_LAYERS = 100_000


class Layout(NamedTuple):
    """Prefix of all keys, ends of the keys of A and B, and whether alpha is a tensor."""

    prefix: str
    a: str = ".lora_A.weight"
    b: str = ".lora_B.weight"
    alpha_tensors: bool = False
    flat: bool = False  # `_` for `.` in names of modules

    def key(self, module: str) -> str:
        """The start of a module's keys."""
        return self.prefix + (module.replace(".", "_") if self.flat else module)


LAYOUTS = {
    "diffusers": Layout("transformer."),
    "peft": Layout("base_model.model."),
    "comfyui": Layout("diffusion_model.", alpha_tensors=True),
    "kohya": Layout("lora_unet_", ".lora_down.weight", ".lora_up.weight", alpha_tensors=True, flat=True),
}


class Pair(NamedTuple):
    """The tensors of a module in a file; alpha is None if there is no tensor of it."""

    a: Tensor
    b: Tensor
    alpha: float | None


def layout_of(keys: Collection[str], file: Path) -> str:
    """The name of the layout of a file by its keys. Raises WeightsError."""
    for name, layout in LAYOUTS.items():
        with_prefix = [key for key in keys if key.startswith(layout.prefix)]
        if with_prefix and len(with_prefix) < len(keys):
            other = next(key for key in keys if key not in with_prefix)
            raise WeightsError(f"{file}: {join_first([other])} is no key of the {name} layout, as the others are")
        if with_prefix:
            return name
    known = ", ".join(f"{layout.prefix} ({name})" for name, layout in LAYOUTS.items())
    problem = f"{join_first([next(iter(keys))])} is no key of an adapter" if keys else "holds no tensors"
    raise WeightsError(f"{file}: {problem}; keys begin with {known}")


def read_pairs(tensors: Mapping[str, Tensor], layout: Layout, file: Path) -> dict[str, Pair]:
    """Start of a module's keys, without the prefix -> its tensors.

    Raises WeightsError for an unknown key, half a pair, and what is given twice.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end = next((end for end in ENDS if key.endswith(end)), None)
        name = key.removeprefix(layout.prefix).removesuffix(end or "")
        if end is None or not name:
            raise WeightsError(f"{file}: {join_first([key])} is not known; adapters have {', '.join(ENDS)}")
        good = tensor.numel() == 1 if ENDS[end] == "alpha" else tensor.ndim == 2 and tensor.is_floating_point()
        if not good:
            raise WeightsError(f"{file}: {join_first([key])} is {shape(tensor)}; save the adapter again")
        if ENDS[end] in found.setdefault(name, {}):
            raise WeightsError(f"{file}: has {ENDS[end]} of {join_first([name])} twice; save the adapter again")
        found[name][ENDS[end]] = tensor
    if len(found) > MAX_LAYERS:
        raise WeightsError(f"{file}: adapts {len(found):,} layers, over {MAX_LAYERS:,}")
    for name, parts in found.items():
        if lost := next((part for part in "AB" if part not in parts), None):
            raise WeightsError(f"{file}: {join_first([name])} has no {lost}; copy the file again")
    return {name: Pair(one["A"], one["B"], _number(one.get("alpha"))) for name, one in found.items()}


def _number(alpha: Tensor | None) -> float | None:
    return None if alpha is None else float(alpha)


def module_names(names: Collection[str], layout: Layout, modules: Collection[str] | None, file: Path) -> dict[str, str]:
    """Name in a file -> name of the module. Raises WeightsError for a flat name without a module.

    `modules` are those of the model, which flat names need.
    """
    if not layout.flat:
        return {name: name for name in names}
    if modules is None:
        raise WeightsError(f"{file}: has names of kohya, which only a model tells apart; name it with --config")
    flat = {module.replace(".", "_"): module for module in modules}
    if unknown := [name for name in names if name not in flat]:
        raise WeightsError(f"{file}: {join_first(unknown, 3)} is no linear layer of the model")
    return {name: flat[name] for name in names}


def write_pairs(layers: Mapping[str, LoRALayer], layout: Layout) -> dict[str, Tensor]:
    """The tensors of a file."""
    tensors: dict[str, Tensor] = {}
    for module, layer in layers.items():
        key = layout.key(module)
        tensors |= {key + layout.a: layer.A, key + layout.b: layer.B}
        if layout.alpha_tensors:
            tensors[f"{key}.alpha"] = _scalar(layer.alpha)
    return tensors


def _scalar(alpha: float) -> Tensor:
    """An alpha as float32, or as float64 if that would change it."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)
