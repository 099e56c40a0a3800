"""Weights stored in 8 bits, int8 or fp8 (e4m3), with one scale for each row.

A file holds `NAME.weight` int8 or float8_e4m3fn [out, in] and `NAME.weight_scale` float32 [out, 1]; the weight is their
product. ComfyUI's name of the scale, `NAME.scale_weight`, and one scale for all rows are read as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from opensora.acceleration.packed_tensor import PackedTensor, unpacked
from opensora.acceleration.quantization import EXACT, KINDS, is_quantizable
from opensora.checkpoints.formatting import join_first, shape
from opensora.errors import WeightsError

DTYPES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
SCALE = "_scale"  # after the name of a weight
COMFYUI = ("scale_weight", "scaled_fp8")  # ComfyUI's scale in place of `weight_scale`, and its mark of such files
EXACT_TENSORS = (*EXACT, "embed", "shared", "norm")  # parts of names of tensors that are not quantized


def pack(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Joins the 8-bit weights of a file with their scales; all other tensors stay as they are.

    fp8 weights of a file without any scale are plain tensors. Raises WeightsError for a scale that is missing, not
    finite or of another shape.
    """
    scales = {weight: name for name in tensors if (weight := _weight_of(name))}
    beside = {COMFYUI[1], *scales.values()}
    packed = {name: tensor for name, tensor in tensors.items() if name not in beside}
    for name, tensor in packed.items():
        if name in scales:
            packed[name] = _joined(name, tensor, tensors[scales[name]], path)
        elif name.endswith(".weight") and (tensor.dtype == torch.int8 or (scales and tensor.dtype in DTYPES)):
            raise WeightsError(
                f"{path}: damaged: {join_first([name])} is {shape(tensor)} and has no scale; convert again"
            )
    if lost := [scale for weight, scale in scales.items() if weight not in tensors]:
        raise WeightsError(f"{path}: damaged: {join_first(lost)} has no weight; convert it again")
    return packed


def has_scales(names: Iterable[str]) -> bool:
    """Whether there are scales among the names of a file's tensors."""
    return any(map(_weight_of, names))


def _weight_of(name: str) -> str:
    """The weight that a tensor is the scale of; empty for other tensors."""
    if name.endswith(f".weight{SCALE}"):
        return name.removesuffix(SCALE)
    start, _, end = name.rpartition(".")
    return f"{start}.weight" if start and end == COMFYUI[0] else ""


def _joined(name: str, weight: Tensor, scale: Tensor, path: Path) -> PackedTensor:
    rows = weight.shape[0] if weight.ndim == 2 else 0
    if weight.dtype not in DTYPES or not rows:
        raise WeightsError(
            f"{path}: damaged: {join_first([name])} has a scale, but is {shape(weight)}; convert it again"
        )
    if not scale.is_floating_point() or scale.numel() not in (1, rows):
        raise WeightsError(
            f"{path}: damaged: the scale of {join_first([name])} is {shape(scale)}, not [{rows}, 1]; convert it again"
        )
    if not scale.float().isfinite().all():
        raise WeightsError(f"{path}: damaged: the scale of {join_first([name])} has NaN or infinity; convert it again")
    return PackedTensor(weight, scale.float().reshape(-1, 1).expand(rows, 1).contiguous(), DTYPES[weight.dtype])


def quantize_tensors(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors with the weights of linear layers in 8 bits, as `PackedTensor`.

    Layers whose quantization costs much and saves little (`EXACT`), embeddings and small layers stay as they are.
    """
    return {name: _quantized(name, tensor, kind) for name, tensor in tensors.items()}


def _quantized(name: str, tensor: Tensor, kind: str) -> Tensor:
    if isinstance(tensor, PackedTensor) and tensor.format == kind:
        return tensor
    linear = name.endswith(".weight") and tensor.is_floating_point() and tensor.ndim == 2
    if not linear or any(part in name for part in EXACT_TENSORS) or not is_quantizable(tensor.shape):
        return tensor
    weight, scale = KINDS[kind].quantize(tensor)
    return PackedTensor(weight, scale, kind)


def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file holds them: 8-bit weights apart from their scales, others plain."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, PackedTensor) and tensor.scale is not None:
            found |= {name: tensor.packed, name + SCALE: tensor.scale}
        else:
            found[name] = unpacked(tensor)
    return found
