"""Wrapper prefixes in tensor names, and detection of adapters such as LoRA."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from opensora.checkpoints.formatting import join_first
from opensora.errors import WeightsError

# Prefixes of all names, added by torch.nn.DataParallel, torch.compile, Lightning and others.
PREFIXES = ("_orig_mod.", "module.", "model.diffusion_model.", "diffusion_model.")
# Infixes in names of wrapped submodules, added by torch.compile, FSDP and activation checkpointing.
INFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
ADAPTER = re.compile(r"(^|[._])(lora|lokr|loha|hada|oft|dora|ia3)_\w+(\.|$)|_lora\.(up|down)\.")


def strip_wrappers(
    tensors: Mapping[str, Tensor], own: Collection[str], path: Path
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """Removes wrapper prefixes that the model's names `own` lack; returns the tensors and the removed prefixes.

    Raises WeightsError if only some of the names have such a prefix.
    """
    stripped = []
    while prefix := next((one for one in PREFIXES if _wraps(one, tensors, own)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        stripped.append(prefix)
    for infix in INFIXES:
        if any(f".{infix}" in name for name in tensors) and not any(infix in name for name in own):
            renamed = {name.replace(f".{infix}", "."): tensor for name, tensor in tensors.items()}
            if len(renamed) < len(tensors):
                raise WeightsError(f"{path}: holds tensors of one name with and without `{infix}`; give one of them")
            tensors = renamed
            stripped.append(infix)
    for prefix in PREFIXES:
        some = [name for name in tensors if name.startswith(prefix)]
        if some and not any(name.startswith(prefix) for name in own):
            problem = f"{len(some):,} of {len(tensors):,} names begin with `{prefix}`, the others do not"
            others = join_first([name for name in tensors if name not in some], 3)
            raise WeightsError(f"{path}: {problem} ({others}); give one model")
    return tensors, tuple(stripped)


def _wraps(prefix: str, names: Collection[str], own: Collection[str]) -> bool:
    """Whether all names begin with a prefix that the model's own names lack."""
    if not names or not all(name.startswith(prefix) for name in names):
        return False
    if not any(name.startswith(prefix) for name in own):
        return True
    inner = (one for one in PREFIXES if all(name.startswith(prefix + one) for name in names))
    return any(not any(name.startswith(prefix + one) for name in own) for one in inner)


def common_prefix(names: Collection[str]) -> str:
    """The longest common prefix of several names that ends with a dot, or an empty text."""
    if len(names) < 2:
        return ""
    one, other = min(names), max(names)
    shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    return one[: one[:shared].rfind(".") + 1]


def adapter_names(names: Collection[str]) -> list[str]:
    """The names that belong to an adapter such as LoRA."""
    return [name for name in names if ADAPTER.search(name)]


def check_no_adapter(names: Collection[str], path: Path) -> None:
    """Raises WeightsError for adapter weights, alone or inside a model."""
    found = adapter_names(names) or (list(names) if _is_adapter_folder(path) else [])
    if not found:
        return
    if any(".base_layer." in name for name in names):
        problem, remedy = "is a model with an adapter in it", "merge the two, then save it"
    else:
        problem, remedy = "is an adapter, not a model", "give it with --lora, beside the weights of its model"
    raise WeightsError(f"{path}: {problem} ({join_first(found, 2)}); {remedy}")


def _is_adapter_folder(path: Path) -> bool:
    folder = path if path.is_dir() else path.parent
    stated = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    return stated and (path.is_dir() or path.stem.startswith("adapter"))
