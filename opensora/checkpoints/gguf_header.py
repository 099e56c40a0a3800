"""Reads the header of a GGUF file within limits: its metadata, and where its tensors are.

Format: docs/gguf.md of github.com/ggml-org/ggml, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from opensora.acceleration.packed_formats import FORMATS
from opensora.checkpoints.formatting import join_first
from opensora.errors import WeightsError
from opensora.files import open_regular

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_HEADER_BYTES = 64 * 2**20
MAX_TENSORS, MAX_KEYS, MAX_VALUES = 2**16, 2**12, 2**20  # MAX_VALUES: in all arrays together
MAX_NAME_BYTES, MAX_DIMENSIONS = 2**12, 5
PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}  # ggml type -> dtype
PACKED = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # to struct codes
STRING, ARRAY = 8, 9


class TensorInfo(NamedTuple):
    """A tensor of a file: its ggml type, shape (rows first), and its bytes from `start` to `end` of the file."""

    ggml_type: int
    shape: tuple[int, ...]
    start: int
    end: int


class GGUFHeader(NamedTuple):
    """The metadata of a file and where its tensors are."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_gguf_header(path: Path) -> GGUFHeader:
    """The header of a file. Raises WeightsError naming the file."""
    with open_regular(path, WeightsError) as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise WeightsError(f"{path}: truncated, damaged or not a GGUF file; download it again")
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), min(size, MAX_HEADER_BYTES), access=mmap.ACCESS_READ) as content:
            return _Reader(path, content, size).header()


class _Reader:
    """Reads values one after the other; each is checked against the limits and the end of the content."""

    def __init__(self, path: Path, content: mmap.mmap, file_size: int) -> None:
        self.path, self.content, self.file_size = path, content, file_size
        self.at, self.values = len(MAGIC), 0

    def header(self) -> GGUFHeader:
        version, tensors, keys = self.number("I"), self.number("Q"), self.number("Q")
        if version not in VERSIONS:
            self.fail(f"GGUF version {version} is not read here (known are 2 and 3, little-endian)")
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            self.fail(f"its header lists {tensors:,} tensors and {keys:,} keys, over {MAX_TENSORS:,} and {MAX_KEYS:,}")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.text(MAX_NAME_BYTES)
            if key in metadata:
                self.fail(f"its header lists {join_first([key])} twice")
            metadata[key] = self.value()
        if metadata.get("split.count", 0) not in (0, 1):
            raise WeightsError(f"{self.path}: is a part of a split model; join the parts with llama-gguf-split --merge")
        return GGUFHeader(metadata, self.tensors(tensors, metadata.get("general.alignment", 32)))

    def tensors(self, count: int, alignment: object) -> dict[str, TensorInfo]:
        """The tensors, whose bytes lie within the file and do not overlap."""
        if type(alignment) is not int or alignment % 8 or not 0 < alignment <= 2**16:
            self.fail("its alignment is no multiple of 8")
        infos: dict[str, TensorInfo] = {}
        for _ in range(count):
            name = self.text(MAX_NAME_BYTES)
            if name in infos:
                self.fail(f"its header lists tensor {join_first([name])} twice")
            infos[name] = self.tensor(name, alignment)
        first = end = -(-self.at // alignment) * alignment
        placed = {name: info._replace(start=first + info.start, end=first + info.end) for name, info in infos.items()}
        for name, info in sorted(placed.items(), key=lambda entry: entry[1].start):
            if info.start < end or info.end > self.file_size:
                self.fail(f"tensor {join_first([name])} exceeds the file or overlaps another")
            end = info.end
        return placed

    def tensor(self, name: str, alignment: int) -> TensorInfo:
        """A tensor whose place is relative to the first one's."""
        dimensions = self.number("I")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            self.fail(f"tensor {join_first([name])} has {dimensions:,} dimensions")
        shape = tuple(reversed([self.number("Q") for _ in range(dimensions)]))
        kind, offset = self.number("I"), self.number("Q")
        if kind in PLAIN:
            block_size, block_bytes = 1, PLAIN[kind].itemsize
        elif kind in PACKED:
            block_size, block_bytes = FORMATS[PACKED[kind]].block_size, FORMATS[PACKED[kind]].block_bytes
        else:
            problem = f"tensor {join_first([name])} is stored as ggml type {kind}, which is not read here"
            known = ", ".join(PACKED.values())
            raise WeightsError(f"{self.path}: {problem}; get the file in {known}, F16, BF16 or F32")
        if not all(shape) or shape[-1] % block_size or offset % alignment:
            self.fail(f"tensor {join_first([name])} has shape {list(shape)} at offset {offset:,}")
        return TensorInfo(kind, shape, offset, offset + math.prod(shape) // block_size * block_bytes)

    def value(self) -> Any:
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(self.code(kind))
        kind, count = self.number("I"), self.number("Q")
        self.values += count
        if self.values > MAX_VALUES:
            self.fail(f"its header holds arrays of more than {MAX_VALUES:,} values")
        if kind == STRING:
            return [self.text() for _ in range(count)]
        code = f"<{count}{self.code(kind)}"
        return list(struct.unpack_from(code, self.content, self.take(struct.calcsize(code))))

    def code(self, kind: int) -> str:
        if kind not in SCALARS:
            self.fail(f"its header holds a value of unknown type {kind}")
        return SCALARS[kind]

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.content, self.take(struct.calcsize(f"<{code}")))[0]

    def text(self, limit: int = MAX_HEADER_BYTES) -> str:
        size = self.number("Q")
        if size > limit:
            self.fail(f"its header holds a text of {size:,} bytes")
        start = self.take(size)
        try:
            return self.content[start : start + size].decode()
        except UnicodeDecodeError:
            self.fail("its header holds a text that is not UTF-8")

    def take(self, size: int) -> int:
        """Skips `size` bytes; returns where they start."""
        start = self.at
        if size > len(self.content) - start:
            self.fail(f"its header ends too early, or exceeds {MAX_HEADER_BYTES:,} bytes")
        self.at = start + size
        return start

    def fail(self, problem: str) -> NoReturn:
        raise WeightsError(f"{self.path}: truncated or damaged: {problem}; download it again")
