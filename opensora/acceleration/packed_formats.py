"""Formats of packed weights: rows of 8-bit values with a scale each, and the blocks of GGUF files.

Blocks as in ggml-common.h of llama.cpp. The values of a block share a scale (`Q8_0`, `Q5_0`, `Q4_0`), or a scale and a
minimum (`Q5_1`, `Q4_1`); or the 8 or 16 sub-blocks of 256 values have scales of 6 or 8 bits (`Q4_K`, `Q5_K`, `Q6_K`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class PackedFormat(NamedTuple):
    """How rows of weights are stored: `block_size` values in `block_bytes` bytes.

    `unpack(packed, scale)` returns float32 [rows, columns]; `scale` [rows, 1] float32 is None for blocks.
    """

    name: str
    block_size: int
    block_bytes: int
    unpack: Callable[[Tensor, Tensor | None], Tensor]


def _rows_of_8_bits(packed: Tensor, scale: Tensor | None) -> Tensor:
    assert scale is not None
    return packed.float().mul_(scale)


def _blocks(size: int, values: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """`unpack` of blocks of `size` bytes, where `values` maps blocks uint8 [N, size] to float32 [N, ...]."""

    def unpack(packed: Tensor, scale: Tensor | None) -> Tensor:
        return values(packed.reshape(-1, size)).reshape(len(packed), -1)

    return unpack


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, as float32 [N, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Low, then high 4 bits of bytes [..., B], as [..., 2, B]."""
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def _fifth_bits(packed: Tensor) -> Tensor:
    """The 32 bits of 4 bytes [N, 4], lowest first, as 16 or 0 [N, 32]."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[:, :, None] >> shifts & 1) << 4).flatten(1)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).flatten(1).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).flatten(1).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 6:]).flatten(1) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (values.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 8:]).flatten(1) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * values.float() + _half(blocks, 2)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum [N, 8, 1] float32 of each sub-block of Q4_K and Q5_K, from 6 bits each in bytes 4 to 15."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low & 63, high & 15 | low >> 2 & 48), dim=1)
    minima = torch.cat((middle & 63, high >> 4 | middle >> 2 & 48), dim=1)
    return (_half(blocks, 0) * scales)[..., None], (_half(blocks, 2) * minima)[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    values = _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).flatten(1, 2)
    return scales * values.float() - minima


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    shifts = torch.arange(8, device=blocks.device, dtype=torch.uint8)[:, None]
    fifth = (blocks[:, None, 16:48] >> shifts & 1) << 4
    values = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).flatten(1, 2) | fifth
    return scales * values.float() - minima


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).flatten(1).unflatten(1, (8, 32))
    shifts = torch.arange(0, 8, 2, device=blocks.device, dtype=torch.uint8)[:, None]
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts & 3).flatten(1, 2)
    values = (low | high << 4).view(torch.int8) - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return scales[..., None] * values.reshape(-1, 16, 16).float()


def _format(name: str, size: int, block_bytes: int, values: Callable[[Tensor], Tensor]) -> PackedFormat:
    return PackedFormat(name, size, block_bytes, _blocks(block_bytes, values))


INT8 = PackedFormat("int8", 1, 1, _rows_of_8_bits)
FP8 = PackedFormat("fp8", 1, 1, _rows_of_8_bits)
GGUF_FORMATS = (
    _format("Q4_0", 32, 18, _q4_0), _format("Q4_1", 32, 20, _q4_1),
    _format("Q5_0", 32, 22, _q5_0), _format("Q5_1", 32, 24, _q5_1), _format("Q8_0", 32, 34, _q8_0),
    _format("Q4_K", 256, 144, _q4_k), _format("Q5_K", 256, 176, _q5_k), _format("Q6_K", 256, 210, _q6_k),
)  # fmt: skip
FORMATS = {one.name: one for one in (INT8, FP8, *GGUF_FORMATS)}
