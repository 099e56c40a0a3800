"""Reads SentencePiece models (`spiece.model`), which are protocol-buffers messages (protobuf.dev, "Encoding").

Fields, from sentencepiece_model.proto: of the model 1 (a piece, repeated), 2 (trainer) and 3 (normalizer); of a piece
1 (text) and 2 (score); of the normalizer 2 (its compiled character map).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


class SentencePieceModel(NamedTuple):
    """Pieces with their scores, and the compiled character map of the normalizer (empty: none)."""

    pieces: list[tuple[str, float]]
    charsmap: bytes


def parse_sentencepiece(content: bytes) -> SentencePieceModel:
    """The model in the content of a file. Raises ValueError if it is damaged or something else."""
    pieces: list[tuple[str, float]] = []
    parts: dict[int, bytes] = {}
    for number, value in _fields(content):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]))
        else:
            parts[number] = value
    if not pieces or not {2, 3} <= parts.keys():
        raise ValueError("no pieces, no trainer or no normalizer")
    return SentencePieceModel(pieces, dict(_fields(parts[3])).get(2, b""))


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each field of a message; the content of a varint is left out."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            _, at = _varint(message, at)
            continue
        if kind == BYTES:
            size, at = _varint(message, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(message):
            raise ValueError("truncated")
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("truncated, or a number of more than 64 bits")
