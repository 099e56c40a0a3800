"""Loads a checkpoint into a model: maps keys, checks shapes and values, fills in the tensors."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.acceleration.model_parts import kept_in_float32
from opensora.checkpoints.advice import mismatch_hint
from opensora.checkpoints.finite import magnitudes
from opensora.checkpoints.formatting import join_first, shape
from opensora.checkpoints.hub import locate
from opensora.checkpoints.key_mapping import Drop, KeyMapping, TensorDict, mapping_for
from opensora.checkpoints.prefixes import check_no_adapter, strip_wrappers
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.remembered_hash import FileIdentity
from opensora.checkpoints.summary import Summary, summarize
from opensora.errors import WeightsError

logger = logging.getLogger("opensora")


def load_weights(
    model: nn.Module, source: str | os.PathLike[str], *, mapping: KeyMapping | None = None,
    dtype: torch.dtype | None = None, strict: bool = True, device: torch.device | None = None,
) -> Summary:  # fmt: skip
    """Loads a file, folder or hub id into `model` and returns a summary of the checkpoint.

    `mapping` replaces the key mapping of the model's class. Floating tensors become `dtype` (None: the model's own),
    except those `kept_in_float32`. Tensors on the meta device are replaced by ones on `device` (None: the host), moved
    and then cast one by one; others are overwritten in place. Fixed positions come from the model's `positions()`. The
    model changes only after everything fits. With `strict=False`, tensors missing from the file keep their values (not
    possible on the meta device) and unexpected ones are ignored; summary and log name both. Raises WeightsError naming
    each tensor that is missing, unexpected, of another shape, or not finite as `dtype`.
    """
    path = locate(source, what=f"{type(model).__name__} weights")
    identity = FileIdentity(path)
    found = read_state_dict(path)
    tensors, changes = fit(model, found, path, mapping, strict)
    own = model.state_dict(keep_vars=True)
    if nowhere := [name for name in changes["initial"] if own[name].is_meta]:
        raise RuntimeError(
            f"strict=False needs a model with initial values, not on the meta device: {join_first(nowhere)}"
        )
    check_finite(
        path, {name: (tensor, _target_dtype(name, own[name], dtype)) for name, tensor in tensors.items() if name in own}
    )
    _fill(model, own, tensors, dtype, device)
    summary = summarize(path, found, identity.content_hash(found))._replace(**changes)
    if summary.initial or summary.ignored:
        logger.warning("%s does not match the %s exactly", summary, type(model).__name__)
    return summary


def fit(
    model: nn.Module, file: TensorDict, path: Path, mapping: KeyMapping | None = None, strict: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors for `model` from a file and its own positions, by the model's names; and the changes, as in Summary.

    The model may be on the meta device and is not changed. Arguments and errors as in `load_weights`.
    """
    own = model.state_dict(keep_vars=True)
    check_no_adapter(file, path)
    file, stripped = strip_wrappers(file, own, path)
    rules = mapping_for(model) if mapping is None else mapping
    active = [rule for rule in rules if rule.applies(file, own)]
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for old, tensor in file.items():
        entry: tuple[str, Tensor] | None = (old, tensor)
        for rule in active:
            entry = entry and rule.load(*entry, own)
        if entry:
            tensors[entry[0]], origin[entry[0]] = entry[1], old
    placed = {name: tensor for name, tensor in tensors.items() if name in own}
    by_holder = {id(own[name]): tensor for name, tensor in placed.items()}
    tied = {
        name: by_holder[id(mine)] for name, mine in own.items() if id(mine) in by_holder
    }  # tied weights may be stored under either name
    with torch.device("cpu"):  # wherever the model is
        filled = {**getattr(model, "positions", dict)(), **tied, **placed}
    kept = [
        name for name in own if not own[name].is_meta and any(r.matches(name) for r in rules if isinstance(r, Drop))
    ]
    missing = [name for name in own if name not in filled and name not in kept]
    unexpected = [name for name in tensors if name not in own]
    misfits = [name for name in placed if not _fits(placed[name], own[name])]
    problems = [f"{name}: expected {shape(own[name])}, found {shape(placed[name])}" for name in misfits]
    if strict or not placed:
        problems += [f"missing {name} {shape(own[name])}" for name in missing]
        problems += [f"unexpected {name} {shape(tensors[name])}" for name in unexpected]
    if problems:
        listed = f"{join_first(problems, separator='; ')}{mismatch_hint(file, own, path)}"
        raise WeightsError(f"{path} does not fit {type(model).__name__}: {listed}")
    return filled, {
        "dropped": tuple(sorted({*file}.difference(origin.values()))),
        "resized": tuple(name for name, old in origin.items() if tensors[name].shape != file[old].shape),
        "renamed": tuple((old, name) for name, old in origin.items() if name != old),
        "initial": tuple(missing), "ignored": tuple(unexpected),
        "stripped": stripped,
    }  # fmt: skip


def _fill(
    model: nn.Module, own: TensorDict, tensors: TensorDict, dtype: torch.dtype | None, device: torch.device | None
) -> None:
    replaced: dict[str, Tensor] = {}
    loaded: dict[int, nn.Parameter] = {}  # by id, so that tied parameters stay tied
    for name, mine in own.items():
        wanted = _target_dtype(name, mine, dtype)
        if not mine.is_meta:
            mine.data = mine.data.to(wanted)
            if name in tensors:
                mine.data.copy_(tensors[name])
        elif isinstance(mine, nn.Parameter):
            if id(mine) not in loaded:
                loaded[id(mine)] = nn.Parameter(_placed(tensors[name], device, wanted), mine.requires_grad)
            replaced[name] = loaded[id(mine)]
        else:
            replaced[name] = _placed(tensors[name], device, wanted)
    model.load_state_dict(replaced, strict=False, assign=True)


def _placed(tensor: Tensor, device: torch.device | None, dtype: torch.dtype) -> Tensor:
    """A tensor moved, then cast: no copy of it is made on the host."""
    return tensor.to(device=device).to(dtype)


def _target_dtype(name: str, mine: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor of the model gets."""
    if not mine.is_floating_point():
        return mine.dtype
    return torch.float32 if kept_in_float32(name) else dtype or mine.dtype


def check_finite(path: Path, tensors: Mapping[str, tuple[Tensor, torch.dtype]]) -> None:
    """Raises WeightsError for tensors that are not finite, or would overflow in the given dtype."""
    found = magnitudes({name: tensor for name, (tensor, _) in tensors.items()})
    if broken := [name for name, value in found.items() if not math.isfinite(value)]:
        raise WeightsError(
            f"{path}: has non-finite values (NaN, infinity) in {join_first(broken, 3)}; "
            "the training diverged or the file is damaged; use another one"
        )
    for name, (_, dtype) in tensors.items():
        if dtype.is_floating_point and found[name] > torch.finfo(dtype).max:
            problem = f"{join_first([name])} has values up to {found[name]:.3g}, too large for {str(dtype)[6:]}"
            raise WeightsError(f"{path}: {problem}; use --dtype bf16 or fp32")


def _fits(found: Tensor, mine: Tensor) -> bool:
    return found.shape == mine.shape and found.is_floating_point() == mine.is_floating_point()
