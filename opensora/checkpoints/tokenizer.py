"""Tokenizers of checkpoint folders: read within limits, and hashed for the recipe."""

from __future__ import annotations

import binascii
import hashlib
from pathlib import Path
from typing import Any

from opensora import files
from opensora.checkpoints.file_kinds import other_kind
from opensora.checkpoints.hub import read_json
from opensora.checkpoints.sentencepiece import SentencePieceModel, parse_sentencepiece
from opensora.config.schema import check
from opensora.config.sections.checkpoints import TokenizerConfig, UnigramTokenizer
from opensora.errors import WeightsError
from opensora.models.text_encoder.tokens import Tokenizer

PIECES, UNIGRAM, VOCAB, MERGES = "spiece.model", "tokenizer.json", "vocab.json", "merges.txt"
CONFIG = "tokenizer_config.json"
JSON = (UNIGRAM, CONFIG, "special_tokens_map.json", "added_tokens.json", VOCAB)
MAX_BYTES = 64 * 2**20  # per file
T5_TOKENS = PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1 and 2


def load_t5_tokenizer(folder: Path) -> Tokenizer:
    """T5's tokenizer from tokenizer.json or spiece.model: a unigram model (Kudo 2018, arXiv:1804.10959).

    Gives the ids of transformers' `T5Tokenizer`. Raises WeightsError for missing or damaged files.
    """
    config = _tokenizer_config(folder)
    if (folder / UNIGRAM).exists():
        model, special = _read_unigram(folder / UNIGRAM)
    elif (folder / PIECES).exists():
        model = _read_pieces(folder / PIECES)
        special = [f"<extra_id_{i}>" for i in reversed(range(config.extra_ids))]
        model.pieces.extend((token, 0.0) for token in special)
    else:
        raise WeightsError(f"{folder}: no T5 tokenizer; the folder needs {PIECES} or {UNIGRAM}")
    return make_t5_tokenizer(model, special, folder)


def make_t5_tokenizer(model: SentencePieceModel, special: list[str], source: Path) -> Tokenizer:
    """The tokenizer of a unigram model; `special` tokens in a text are no text. Raises WeightsError naming `source`."""
    if tuple(piece for piece, _ in model.pieces[:3]) != T5_TOKENS:
        raise WeightsError(f"{source}: not a tokenizer of T5, whose first tokens are {', '.join(T5_TOKENS)}")
    unigram = _unigram(model, special)
    return Tokenizer(lambda text: unigram.encode(text).ids, len(model.pieces), T5_TOKENS.index(PAD))


def _unigram(model: SentencePieceModel, special: list[str]) -> Any:
    """The tokenizer of a model; `special` tokens in a text are no text."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    tokenizer = tokenizers.Tokenizer(models.Unigram(model.pieces, unk_id=T5_TOKENS.index(UNKNOWN)))
    if model.charsmap:
        tokenizer.normalizer = normalizers.Precompiled(model.charsmap)
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    end = (END, T5_TOKENS.index(END))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[end])
    tokenizer.add_special_tokens([*T5_TOKENS, *special])
    return tokenizer


def _read_pieces(path: Path) -> SentencePieceModel:
    content = files.read_bytes(path, MAX_BYTES, WeightsError)
    if kind := other_kind(path):
        raise WeightsError(f"{path}: {kind.replace('not weights', 'not a tokenizer')}")
    try:
        return parse_sentencepiece(content)
    except (ValueError, KeyError) as error:
        problem = "truncated, damaged or not a SentencePiece model; copy or download it again"
        raise WeightsError(f"{path}: {problem}") from error


def _read_unigram(path: Path) -> tuple[SentencePieceModel, list[str]]:
    """The model in a tokenizer.json, and its special tokens."""
    stated: UnigramTokenizer = check(UnigramTokenizer, read_json(path), str(path), WeightsError)
    normalizer: Any = stated.normalizer or {}
    try:
        maps = [one.get("precompiled_charsmap") for one in normalizer.get("normalizers", [normalizer])]
        charsmap = binascii.a2b_base64(next(filter(None, maps), ""))
    except (AttributeError, TypeError, binascii.Error) as error:
        raise WeightsError(f"{path}: its precompiled_charsmap is damaged; copy or download it again") from error
    special = [token.content for token in stated.added_tokens]
    return SentencePieceModel(stated.model.vocab, charsmap), special


def load_clip_tokenizer(folder: Path) -> Tokenizer:
    """CLIP's tokenizer from tokenizer.json, or vocab.json and merges.txt.

    Raises WeightsError for missing or damaged files.
    """
    _tokenizer_config(folder)
    for name in JSON:
        if (folder / name).exists():
            read_json(folder / name)
    if (folder / MERGES).exists() and (kind := other_kind(folder / MERGES)) and "a text file" not in kind:
        raise WeightsError(f"{folder / MERGES}: {kind}")
    if not any(all((folder / name).is_file() for name in names) for names in ((UNIGRAM,), (VOCAB, MERGES))):
        raise WeightsError(f"{folder}: no CLIP tokenizer; it needs {UNIGRAM}, or {VOCAB} and {MERGES}")
    from transformers import CLIPTokenizerFast

    clip = CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    if clip.pad_token_id is None:
        raise WeightsError(f"{folder}: its tokenizer has no padding token; get {CONFIG} again")
    return Tokenizer(
        lambda text: clip(text, truncation=False, verbose=False)["input_ids"], clip.vocab_size, clip.pad_token_id
    )


def _tokenizer_config(folder: Path) -> TokenizerConfig:
    path = folder / CONFIG
    stated = read_json(path) if path.exists() else {}
    return check(TokenizerConfig, stated, str(path), WeightsError)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder's tokenizer, sorted by name."""
    return [folder / name for name in sorted((PIECES, MERGES, *JSON)) if (folder / name).is_file()]


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 over names and contents of the tokenizer files, sorted by name."""
    there = tokenizer_files(folder)
    contents = [files.read_bytes(file, MAX_BYTES, WeightsError) for file in there]
    parts = (f"{file.name}\0{hashlib.sha256(c).hexdigest()}\n" for file, c in zip(there, contents, strict=True))
    return hashlib.sha256("".join(parts).encode()).hexdigest()
