"""Reads PyTorch's pickled checkpoints without unpickling: no code in the file runs, nothing is imported.

Supports both formats of `torch.save`: the zip archive, and the format before PyTorch 1.6 (five pickles followed by the
storages). The pickles are bounded in size; tensors are memory-mapped.
"""

from __future__ import annotations

import io
import mmap
import os
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from opensora.checkpoints.file_kinds import PICKLES, ZIP
from opensora.checkpoints.pickle_interpreter import (
    CorruptFileError,
    PickleInterpreter,
    Storage,
    TensorView,
    UnsafePickleError,
)
from opensora.errors import WeightsError

MAX_BYTES = 32 * 2**20  # pickles of one file
MAX_ENTRIES = 200_000  # entries of a zip archive
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # header of files written before PyTorch 1.6
LOCAL_HEADER = struct.Struct("<4s22xHH")  # zip entry: signature, length of name and of extra field

Extents = dict[str, tuple[int, int]]  # storage key -> (offset in the file, number of bytes)


class Pickled(NamedTuple):
    """The value in a file, with TensorView for each tensor, and the extents of the storages."""

    file: Path
    value: Any
    extents: Extents

    def tensors(self, views: Iterable[TensorView]) -> list[Tensor]:
        """The memory-mapped tensors of views. Raises WeightsError if together they are much larger than the file."""
        views = list(views)
        size, total = self.file.stat().st_size, sum(view.num_bytes for view in views)
        if total > 4 * size + 2**20:  # tied tensors count more than once
            raise WeightsError(f"{self.file}: its tensors repeat {size:,} bytes as {total:,}; save them as copies")
        with self.file.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return [self._tensor(view, memory) for view in views]

    def _tensor(self, view: TensorView, memory: mmap.mmap) -> Tensor:
        begin, length = self.extents.get(view.storage.key, (0, -1))
        if length < view.storage.num_bytes:
            raise WeightsError(f"{self.file}: truncated, damaged or not a PyTorch checkpoint (lacks a storage)")
        if 0 in view.size:
            return torch.empty(view.size, dtype=view.dtype)
        count = view.storage.num_bytes // view.dtype.itemsize
        if begin % view.dtype.itemsize:  # unaligned in files before PyTorch 1.6
            held = bytearray(memory[begin : begin + view.storage.num_bytes])
            return torch.frombuffer(held, dtype=view.dtype, count=count).as_strided(view.size, view.stride, view.offset)
        flat = torch.frombuffer(memory, dtype=view.dtype, count=count, offset=begin)
        return flat.as_strided(view.size, view.stride, view.offset)


def read_pickled(file: Path) -> Pickled:
    """The value in a file written by `torch.save`. Raises WeightsError naming the file."""
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
            stream.seek(0)
            if start == ZIP:
                return Pickled(file, *_read_zip(stream))
            if start.startswith(PICKLES):
                return Pickled(file, *_read_legacy(stream))
            raise CorruptFileError("it is not an archive")
    except UnsafePickleError as error:
        raise WeightsError(
            f"{file}: refused, it asks to run code ({str(error)[:80]}); "
            "only files that hold nothing but tensors are loaded, best as .safetensors"
        ) from error
    except (CorruptFileError, OSError, zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        raise WeightsError(f"{file}: truncated, damaged or not a PyTorch checkpoint ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__


def _read_zip(stream: BinaryIO) -> tuple[Any, Extents]:
    with zipfile.ZipFile(stream) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) > MAX_ENTRIES:
        raise CorruptFileError(f"its archive has {len(entries):,} entries")
    root = _root(entries)
    if any(name.startswith(f"{root}code/") or name == f"{root}constants.pkl" for name in entries):
        raise CorruptFileError(
            "a TorchScript program, not weights: save torch.jit.load(FILE).state_dict() with torch.save, and give that"
        )
    if (order := entries.get(f"{root}byteorder")) and _content(stream, order, 16) != b"little":
        raise CorruptFileError("written on a machine of the other byte order; save it again on one like this")
    interpreter = PickleInterpreter()
    value = interpreter.run(io.BytesIO(_content(stream, entries[f"{root}data.pkl"], MAX_BYTES)))
    held = {key: entries.get(f"{root}data/{key}") for key in interpreter.storages}
    return value, {key: _extent(stream, entry) for key, entry in held.items() if entry}


def _root(entries: Iterable[str]) -> str:
    """The root folder of PyTorch's entries in an archive."""
    for name in entries:
        if name.endswith("/data.pkl") and name.count("/") == 1:
            return name.removesuffix("data.pkl")
    inside = sorted(entries)
    if any(name.endswith((".pt", ".pth", ".bin", ".safetensors", ".ckpt")) for name in inside):
        raise CorruptFileError("an archive of other files; unpack it, and give the file inside")
    kind = "NumPy arrays" if any(name.endswith(".npy") for name in inside) else "other files"
    raise CorruptFileError(f"an archive of {kind}, not of torch.save")


def _content(stream: BinaryIO, entry: zipfile.ZipInfo, most: int) -> bytes:
    begin, length = _extent(stream, entry)
    if length > most:
        raise CorruptFileError(f"an entry of its archive has {length:,} bytes, over {most:,}")
    stream.seek(begin)
    return stream.read(length)


def _extent(stream: BinaryIO, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """(offset, number of bytes) of an entry's content."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise CorruptFileError("its archive is compressed or encrypted, which torch.save never does; save it again")
    stream.seek(entry.header_offset)
    header = stream.read(LOCAL_HEADER.size)
    mark, name, extra = LOCAL_HEADER.unpack(header.ljust(LOCAL_HEADER.size, b"\0"))
    begin = entry.header_offset + LOCAL_HEADER.size + name + extra
    if mark != ZIP or begin + entry.file_size > os.fstat(stream.fileno()).st_size:
        raise CorruptFileError("an entry of its archive exceeds the file")
    return begin, entry.file_size


def _read_legacy(stream: BinaryIO) -> tuple[Any, Extents]:
    begin, interpreter = io.BytesIO(stream.read(MAX_BYTES)), PickleInterpreter()
    if interpreter.run(begin) != MAGIC or interpreter.run(begin) != PROTOCOL:
        raise CorruptFileError("a Python pickle that torch.save has not written; save its state dict with torch.save")
    system, value, keys = (interpreter.run(begin) for _ in range(3))
    if not isinstance(system, dict) or not system.get("little_endian", True) or not isinstance(keys, list):
        raise CorruptFileError("written on another kind of machine; save it again on one like this")
    extents, position, size = {}, begin.tell(), os.fstat(stream.fileno()).st_size
    for key in keys:
        storage = interpreter.storages.get(key) if isinstance(key, str) else None
        stream.seek(position)
        extents[key] = (position + 8, _checked_length(storage, stream.read(8), size - position - 8))
        position += 8 + extents[key][1]
    return value, extents


def _checked_length(storage: Storage | None, count: bytes, left: int) -> int:
    """The size in bytes of a storage of `count` elements, if `left` bytes remain in the file."""
    itemsize = storage.dtype.itemsize if storage and storage.dtype else 1
    if storage is None or len(count) < 8 or int.from_bytes(count, "little") * itemsize != storage.num_bytes:
        raise CorruptFileError("its storages are not those of its tensors")
    if storage.num_bytes > left:
        raise CorruptFileError("its end is missing")
    return storage.num_bytes
