"""Tokenizer files: checked before a library reads them, and hashed for the recipe."""

from __future__ import annotations

import hashlib
from pathlib import Path

from opensora import files
from opensora.checkpoints.file_kinds import other_kind
from opensora.checkpoints.hub import read_json
from opensora.errors import WeightsError

PIECES, MERGES = "spiece.model", "merges.txt"
JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
MAX_BYTES = 64 * 2**20  # per file


def check_tokenizer(folder: Path) -> None:
    """Raises WeightsError for a tokenizer file that is damaged or something else. Missing files are fine."""
    for name in JSON:
        if (folder / name).exists():
            read_json(folder / name)
    if (folder / MERGES).exists() and (kind := other_kind(folder / MERGES)) and "a text file" not in kind:
        raise WeightsError(f"{folder / MERGES}: {kind}")
    if (folder / PIECES).exists():
        _check_pieces(folder / PIECES)


def _check_pieces(path: Path) -> None:
    import sentencepiece

    content = files.read_bytes(path, MAX_BYTES, WeightsError)
    if kind := other_kind(path):
        raise WeightsError(f"{path}: {kind.replace('not weights', 'not a tokenizer')}")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        pieces = processor.get_piece_size() if processor.LoadFromSerializedProto(content) else 0
    except RuntimeError:  # its message refers to source lines
        pieces = 0
    if not pieces:
        raise WeightsError(f"{path}: truncated, damaged or not a SentencePiece model; copy or download it again")


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 over names and contents of the tokenizer files, sorted by name."""
    there = [name for name in sorted((PIECES, MERGES, *JSON)) if (folder / name).is_file()]
    contents = [files.read_bytes(folder / name, MAX_BYTES, WeightsError) for name in there]
    parts = (f"{n}\0{hashlib.sha256(c).hexdigest()}\n" for n, c in zip(there, contents, strict=True))
    return hashlib.sha256("".join(parts).encode()).hexdigest()
