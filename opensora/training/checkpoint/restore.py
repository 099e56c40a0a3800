"""Reads and validates a whole training checkpoint before any state of the run changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from opensora.checkpoints.lora import adapter_file
from opensora.checkpoints.pickle_interpreter import TensorView
from opensora.checkpoints.pickles import Pickled, read_pickled
from opensora.checkpoints.read import read_state_dict
from opensora.config.schema import Count, NonNegative, Positive, Schema, check
from opensora.distributed.full_state_dict import copy_full, distribute_like
from opensora.errors import WeightsError
from opensora.training.adapter import read_adapter_state, trained_state
from opensora.training.checkpoint import manifest
from opensora.training.checkpoint.running_states import RunningStates, read_running_states
from opensora.training.ema import EMA

OPTIMIZER = Path("optimizer") / "optimizer.pt"
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
REMEDY = "it is damaged; try an older checkpoint"


class ScalerState(Schema):
    """`GradScaler.state_dict()`."""

    scale: Annotated[NonNegative, Field(gt=0)]
    growth_factor: Annotated[NonNegative, Field(gt=1)]
    backoff_factor: Annotated[NonNegative, Field(gt=0, lt=1)]
    growth_interval: Positive
    growth_tracker: Annotated[int, Field(ge=0, alias="_growth_tracker")]


class LoadedCheckpoint(NamedTuple):
    """The content of a checkpoint in host memory.

    moments: AdamW's state by parameter index
    num_parameters: of the optimizer
    scaler: empty unless the run was in fp16
    """

    folder: Path
    running_states: RunningStates
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    moments: dict[int, dict[str, Tensor]]
    num_parameters: int
    scaler: dict[str, Any]


def read_checkpoint(folder: Path, verify_hashes: bool = True) -> LoadedCheckpoint:
    """Reads a checkpoint without executing anything in it. Raises WeightsError naming a damaged file."""
    if verify_hashes:
        manifest.verify(folder)
    running_states = read_running_states(folder)
    adapter = adapter_file(folder / "model")
    model = read_adapter_state(str(adapter)) if adapter else read_state_dict(folder / "model")
    ema = read_state_dict(folder / "ema.pt")
    for where, tensors in ((folder / "model", model), (folder / "ema.pt", ema)):
        _require_finite(where, tensors.items())
    path = folder / OPTIMIZER
    pickled = _read_optimizer_file(path)
    moments, num_parameters = _moments(pickled.value.get("optimizer"), pickled)
    scaler = pickled.value.get("scaler") or {}
    if scaler:
        check(ScalerState, scaler, f"{path}: scaler", WeightsError, REMEDY)
    return LoadedCheckpoint(folder, running_states, model, ema, moments, num_parameters, scaler)


def _read_optimizer_file(path: Path) -> Pickled:
    """The unpickled dict, by the bounded unpickler, which calls no code of the file; its tensors are not read yet."""
    if not path.is_file():
        raise WeightsError(f"{path}: is missing; training cannot resume: load only the weights with --ckpt-path")
    try:
        pickled = read_pickled(path)
    except WeightsError as error:
        raise WeightsError(f"{error}; {REMEDY}") from error
    if not isinstance(pickled.value, dict):
        raise WeightsError(f"{path}: holds a {type(pickled.value).__name__}, not the state of an optimizer; {REMEDY}")
    return pickled


def _moments(optimizer: Any, pickled: Pickled) -> tuple[dict[int, dict[str, Tensor]], int]:
    """AdamW's moments by parameter index, and the number of parameters."""
    path, groups = pickled.file, optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    params = [group.get("params") if isinstance(group, dict) else None for group in groups or ()]
    if not params or not all(isinstance(one, list) for one in params) or not isinstance(optimizer.get("state"), dict):
        raise WeightsError(f"{path}: holds no state of an optimizer; {REMEDY}")
    flat = [index for group in params for index in group or ()]
    check(list[Count], flat, f"{path}: params", WeightsError, REMEDY)
    known, state = set(flat), optimizer["state"]
    for index, own in state.items():
        if index not in known or not _are_moments(own):
            raise WeightsError(f"{path}: the moments of parameter {str(index)[:20]} are not those of AdamW; {REMEDY}")
    tensors = iter(pickled.tensors(view for own in state.values() for view in own.values()))
    moments = {index: {name: next(tensors) for name in own} for index, own in state.items()}
    for index, own in moments.items():
        _require_finite(path, ((f"{name} of parameter {index}", one) for name, one in own.items()))
    return moments, len(flat)


def _are_moments(own: Any) -> bool:
    if (
        not isinstance(own, dict)
        or own.keys() != MOMENTS
        or not all(isinstance(one, TensorView) for one in own.values())
    ):
        return False
    return math.prod(own["step"].size) == 1 and tuple(own["exp_avg"].size) == tuple(own["exp_avg_sq"].size)


def _require_finite(where: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not all(one.isfinite() for one in tensor.aminmax()):
            raise WeightsError(f"{where}: {name} is not finite; {REMEDY}")


def check_fit(saved: LoadedCheckpoint, model: nn.Module, parameters: Sequence[Tensor]) -> None:
    """Raises WeightsError unless a checkpoint fits `model` and its trained `parameters`."""
    own, kind = trained_state(model), type(model).__name__
    for what, found in (("model", saved.model), ("averaged weights", saved.ema)):
        wrong = [name for name in {*own, *found} if name not in own or name not in found]
        wrong += [name for name in own.keys() & found.keys() if own[name].shape != found[name].shape]
        if wrong:
            problem = f"{saved.folder}: its {what} does not fit {kind}: {len(wrong)} tensors, such as {min(wrong)}"
            raise WeightsError(f"{problem}; load it with the model that was trained")
    if saved.num_parameters != len(parameters):
        problem = f"its optimizer is that of {saved.num_parameters} tensors, {len(parameters)} are trained"
        remedy = "train the same parts, or load only the weights, with --ckpt-path"
        raise WeightsError(f"{saved.folder}: {problem}; {remedy}")
    for index, own_moments in saved.moments.items():
        shape, wanted = tuple(own_moments["exp_avg"].shape), tuple(parameters[index].shape)
        if shape != wanted:
            problem = f"the moments of parameter {index} have the shape {shape}, not {wanted}"
            raise WeightsError(f"{saved.folder / OPTIMIZER}: {problem}; {REMEDY}")


def load_into(
    saved: LoadedCheckpoint, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:  # fmt: skip
    """Copies a checkpoint that fits into a run, sharded or not. The optimizer keeps its own hyperparameters."""
    for name, tensor in trained_state(model).items():
        copy_full(tensor, saved.model[name])
    ema.load_state_dict(saved.ema)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {index: _spread(own, parameters[index]) for index, own in saved.moments.items()}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if saved.scaler:
        scaler.load_state_dict(saved.scaler)


def _spread(moments: Mapping[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """Shards the moments like their parameter; the step count is a scalar and stays replicated."""
    return {name: one if name == "step" else distribute_like(one, parameter) for name, one in moments.items()}
