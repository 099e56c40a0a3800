"""What wrappers put into the names of all tensors, and what tells an adapter from a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from opensora.checkpoints.text import first
from opensora.errors import WeightsError

# Put before all names by torch.nn.DataParallel, torch.compile, Lightning and others.
PREFIXES = ("_orig_mod.", "module.", "model.diffusion_model.", "diffusion_model.")
# Put before the names inside of wrapped parts by torch.compile, FSDP and activation checkpointing.
INFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
ADAPTER = re.compile(r"(^|[._])(lora|lokr|loha|hada|oft|dora|ia3)_\w+(\.|$)|_lora\.(up|down)\.")


def strip_wrappers(
    tensors: Mapping[str, Tensor], own: Collection[str], path: Path
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """Tensors under names without what known wrappers have put into them, as the names `own` lack it; and that.

    Raises WeightsError if some names begin with such a prefix and others do not.
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
            raise WeightsError(f"{path}: {problem} ({first([n for n in tensors if n not in some], 3)}); give one model")
    return tensors, tuple(stripped)


def _wraps(prefix: str, names: Collection[str], own: Collection[str]) -> bool:
    """Whether a prefix stands before all names and is none of the model's own."""
    if not names or not all(name.startswith(prefix) for name in names):
        return False
    if not any(name.startswith(prefix) for name in own):
        return True
    inner = (one for one in PREFIXES if all(name.startswith(prefix + one) for name in names))
    return any(not any(name.startswith(prefix + one) for name in own) for one in inner)


def common_prefix(names: Collection[str]) -> str:
    """What all of several names begin with, up to a dot; an empty text if nothing."""
    if len(names) < 2:
        return ""
    one, other = min(names), max(names)
    shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    return one[: one[:shared].rfind(".") + 1]


def adapter_names(names: Collection[str]) -> list[str]:
    """Those of some names that are of an adapter, such as LoRA."""
    return [name for name in names if ADAPTER.search(name)]


def check_no_adapter(names: Collection[str], path: Path) -> None:
    """Raises WeightsError for the weights of an adapter, alone or within a model."""
    found = adapter_names(names) or (list(names) if _stated_adapter(path) else [])
    if not found:
        return
    if any(".base_layer." in name for name in names):
        raise WeightsError(f"{path}: is a model with an adapter in it ({first(found, 2)}); merge the two, then save it")
    remedy = "merge it into its model and give the result"
    raise WeightsError(f"{path}: is an adapter ({first(found, 2)}), not a model; {remedy}")


def _stated_adapter(path: Path) -> bool:
    folder = path if path.is_dir() else path.parent
    stated = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    return stated and (path.is_dir() or path.stem.startswith("adapter"))
