"""Reads GGUF files; blocks of quantized weights stay packed."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from opensora.acceleration.packed_tensor import PackedTensor
from opensora.checkpoints.formatting import join_first
from opensora.checkpoints.gguf_header import MAX_DIMENSIONS, PACKED, PLAIN, GGUFHeader, read_gguf_header
from opensora.errors import WeightsError

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # + a tensor's name: more dimensions than the format allows


def read_gguf(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped: quantized matrices as `PackedTensor`, others as plain tensors.

    Raises WeightsError naming the file.
    """
    header = read_gguf_header(path)
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return {name: _tensor(path, name, header, content) for name in header.tensors}


def _tensor(path: Path, name: str, header: GGUFHeader, content: Tensor) -> Tensor:
    info, shape = header.tensors[name], _model_shape(path, name, header)
    stored = content[info.start : info.end]
    if info.ggml_type in PLAIN:
        return stored.view(PLAIN[info.ggml_type]).view(shape)
    rows = math.prod(info.shape[:-1])
    packed = PackedTensor(stored.view(rows, -1), None, PACKED[info.ggml_type])
    return packed if packed.shape == shape else packed.unpack().view(shape)


def _model_shape(path: Path, name: str, header: GGUFHeader) -> tuple[int, ...]:
    """The shape of a tensor in its model; ComfyUI-GGUF states it where it differs from the file's."""
    shape, stated = header.tensors[name].shape, header.metadata.get(ORIGINAL_SHAPE + name)
    if stated is None:
        return shape
    sizes = isinstance(stated, list) and all(type(size) is int and size > 0 for size in stated)
    if not sizes or not 0 < len(stated) <= MAX_DIMENSIONS or math.prod(stated) != math.prod(shape):
        raise WeightsError(f"{path}: damaged: the original shape of {join_first([name])} is not that of its tensor")
    return tuple(stated)
