"""Configuration and tokenizer in the header of a T5 GGUF file, as llama.cpp's converter writes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from opensora.checkpoints.gguf_header import GGUFHeader, read_gguf_header
from opensora.checkpoints.hub import checkpoint_files
from opensora.checkpoints.sentencepiece import SentencePieceModel
from opensora.errors import WeightsError

ARCHITECTURES = ("t5", "t5encoder")
CONFIG = {  # key after the architecture -> key of config.json
    "embedding_length": "d_model", "attention.key_length": "d_kv", "feed_forward_length": "d_ff",
    "block_count": "num_layers", "attention.head_count": "num_heads",
    "attention.relative_buckets_count": "relative_attention_num_buckets",
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
}  # fmt: skip
TOKENS = "tokenizer.ggml."
NORMAL, SPECIAL, UNUSED = 1, (2, 3, 4), 5  # types of tokens


def t5_header(path: Path) -> GGUFHeader | None:
    """The header of the T5 GGUF file at `path`, a file or its folder; None for other checkpoints."""
    if path.suffix != ".gguf" and not (path.is_dir() and any(path.glob("*.gguf"))):
        return None
    [file, *_] = checkpoint_files(path)
    header = read_gguf_header(file) if file.suffix == ".gguf" else None
    return header if header and header.metadata.get("general.architecture") in ARCHITECTURES else None


def t5_config(header: GGUFHeader) -> dict[str, Any]:
    """The keys of a config.json that the header states."""
    metadata, tensors = header.metadata, header.tensors
    prefix = metadata["general.architecture"]
    stated = {ours: metadata[f"{prefix}.{key}"] for key, ours in CONFIG.items() if f"{prefix}.{key}" in metadata}
    stated["feed_forward_proj"] = "gated-gelu" if "enc.blk.0.ffn_gate.weight" in tensors else "relu"
    if "token_embd.weight" in tensors:
        stated["vocab_size"] = tensors["token_embd.weight"].shape[0]
    return stated


def t5_pieces(header: GGUFHeader, path: Path) -> tuple[SentencePieceModel, list[str]] | None:
    """The unigram model in the header and its special tokens; None if it holds none. Raises WeightsError."""
    tokens, scores = header.metadata.get(f"{TOKENS}tokens"), header.metadata.get(f"{TOKENS}scores")
    if tokens is None or header.metadata.get(f"{TOKENS}model") != "t5":
        return None
    kinds = header.metadata.get(f"{TOKENS}token_type", [NORMAL] * len(tokens))
    charsmap = header.metadata.get(f"{TOKENS}precompiled_charsmap", [])
    try:
        pieces = [(str(token), float(score)) for token, score in zip(tokens, scores or (), strict=True)]
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind in SPECIAL]
        while pieces and kinds[len(pieces) - 1] == UNUSED:  # fill up the embedding
            pieces.pop()
        return SentencePieceModel(pieces, bytes(byte % 256 for byte in charsmap)), special
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: damaged: tokens, scores and types of its tokenizer do not fit") from error


def t5_tokenizer_hash(header: GGUFHeader) -> str:
    """SHA-256 of the tokenizer in the header."""
    stated = {key: value for key, value in sorted(header.metadata.items()) if key.startswith(TOKENS)}
    return hashlib.sha256(json.dumps(stated).encode()).hexdigest()
