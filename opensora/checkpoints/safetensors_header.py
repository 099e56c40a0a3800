"""Reads and checks the header of a .safetensors file before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opensora.errors import WeightsError
from opensora.files import MAX_JSON_BYTES, parse_json

# Dtypes that a model can have; the format defines more.
DTYPES = {"BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64"}
DTYPES |= {"F8_E4M3", "F8_E5M2"}


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a .safetensors file. Raises WeightsError if it is damaged."""
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        if not 2 <= length <= size - 8:
            raise WeightsError(f"{path}: truncated, damaged or not a safetensors file (its header exceeds the file)")
        if length > MAX_JSON_BYTES:
            raise WeightsError(f"{path}: its header has {length:,} bytes, over {MAX_JSON_BYTES:,}")
        text = file.read(length)
    header = parse_json(text, f"{path}: truncated, damaged or not a safetensors file", WeightsError)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"} if _is_dict(header) else None
    if entries is None or not all(map(_is_dict, entries.values())):
        raise WeightsError(f"{path}: truncated, damaged or not a safetensors file (its header does not list tensors)")
    for name, entry in entries.items():
        if (dtype := str(entry.get("dtype"))) not in DTYPES:
            raise WeightsError(f"{path}: tensor '{name[:80]}' is of type {dtype[:20]!r}, which no model here takes")
    return header


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)
