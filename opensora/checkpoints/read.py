"""Reads checkpoints: tensors by name from files, indices and folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from opensora.checkpoints import eight_bits
from opensora.checkpoints.file_kinds import other_kind, weights_by_content
from opensora.checkpoints.formatting import join_first
from opensora.checkpoints.gguf import read_gguf
from opensora.checkpoints.gguf_header import PACKED, read_gguf_header
from opensora.checkpoints.hub import SUFFIXES, UNFINISHED, checkpoint_files, one_line
from opensora.checkpoints.pickle_interpreter import TensorView, Unsupported
from opensora.checkpoints.pickles import read_pickled
from opensora.checkpoints.safetensors_header import read_header
from opensora.errors import WeightsError

WRAPPERS = ("state_dict", "ema", "model", "module")
MAX_WRAPPERS = 8
KNOWN, SAFE, GGUF = ", ".join(SUFFIXES), ".safetensors", ".gguf"
TRAINING_STATE = {"optimizer", "optimizer_state_dict", "optimizer_states", "param_groups", "lr_schedulers", "scaler"}


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors on the CPU by name from a file, an index or a folder, memory-mapped where the format allows.

    Reads .safetensors, .gguf, and .pt, .pth, .bin without running code in them; unwraps a state dict under
    `state_dict`, `ema`, `model` or `module`. Quantized weights are `PackedTensor`. Each shard must hold exactly the
    tensors that the index lists for it. Raises WeightsError naming the file, and what it is if it holds no weights.
    """
    tensors: dict[str, Tensor] = {}
    for file, promised in checkpoint_files(Path(path)).items():
        found = _read_file(file)
        if absent := [name for name in promised if name not in found]:
            raise WeightsError(f"{file}: lacks tensors that the index lists: {join_first(absent)}; copy it again")
        if promised and (more := sorted(found.keys() - set(promised))):
            raise WeightsError(
                f"{file}: holds tensors that the index does not list for it: {join_first(more)}; "
                "they belong to different checkpoints; copy both again"
            )
        tensors.update(found)
    return eight_bits.pack(tensors, Path(path))


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        _check_kind(file)
        if file.suffix == GGUF:
            return read_gguf(file)
        return _read_safetensors(file) if file.suffix == SAFE else _read_pickled(file)
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({one_line(error)})") from error


def _check_kind(file: Path) -> None:
    """Raises WeightsError for a file that is not weights by its suffix or first bytes."""
    if file.suffix in UNFINISHED:
        raise WeightsError(f"{file}: is an unfinished download; get it again")
    kind, suffix = other_kind(file), weights_by_content(file)
    if file.suffix not in SUFFIXES:
        found = f"it {kind}" if kind else f"its content is that of a {suffix} file: rename it" if suffix else ""
        raise WeightsError(f"{file}: not a weight file; {found or f'known are {KNOWN} and index files'}")
    if kind:
        raise WeightsError(f"{file}: {kind}")
    if suffix and suffix != (file.suffix if file.suffix in (SAFE, GGUF) else ".pt"):
        raise WeightsError(f"{file}: its content is that of a {suffix} file: rename it to {file.stem}{suffix}")


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    read_header(file)
    try:
        return load_safetensors(file)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(f"{file}: truncated, damaged or not a safetensors file ({one_line(error)})") from error


def _read_pickled(file: Path) -> dict[str, Tensor]:
    pickled = read_pickled(file)
    found = _unwrap(file, pickled.value)
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, TensorView):
            raise WeightsError(f"{file}: not a state dict: {_describe_entry(name, value)}")
    return dict(zip(found, pickled.tensors(found.values()), strict=True))


def _unwrap(file: Path, value: Any) -> Mapping[str, Any]:
    """The state dict inside the value of a file. Raises WeightsError if there is none."""
    for _ in range(MAX_WRAPPERS):
        key = next((k for k in WRAPPERS if isinstance(value, dict) and isinstance(value.get(k), dict)), None)
        if key is None:
            break
        value = value[key]
    else:
        raise WeightsError(f"{file}: not a state dict: more than {MAX_WRAPPERS} dicts inside one another")
    if not isinstance(value, dict) or not value:
        raise WeightsError(f"{file}: holds {_kind(value)}, not a state dict (tensors by name)")
    if all(isinstance(name, int) for name in value):
        raise WeightsError(f"{file}: not a state dict: its keys are integers, not tensor names")
    if TRAINING_STATE & value.keys() and not any(isinstance(one, TensorView) for one in value.values()):
        remedy = "give the weights saved beside it, such as model/ or ema.pt"
        raise WeightsError(f"{file}: holds the state of a training run, not a state dict; {remedy}")
    return value


def _describe_entry(name: Any, value: Any) -> str:
    if not isinstance(name, str):
        return f"the name {str(name)[:20]!r} is not a string"
    return f"entry '{join_first([name])}' is {_kind(value)}, not a plain tensor"


def _kind(value: Any) -> str:
    if isinstance(value, TensorView):
        return "a tensor"
    return value.what if isinstance(value, Unsupported) else "None" if value is None else f"a {type(value).__name__}"


def is_packed(path: Path) -> bool:
    """Whether a checkpoint holds quantized weights; reads headers alone. Raises WeightsError."""
    for file in checkpoint_files(path):
        if file.suffix == GGUF and any(info.ggml_type in PACKED for info in read_gguf_header(file).tensors.values()):
            return True
        if file.suffix == SAFE and eight_bits.has_scales(read_header(file)):
            return True
    return False


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a .safetensors file. Raises WeightsError naming the file."""
    path = Path(path)
    try:
        _check_kind(path)
        read_header(path)
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: truncated, damaged or not a safetensors file ({one_line(error)})") from error
