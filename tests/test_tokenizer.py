"""Tokenizers of checkpoint folders against transformers' and SentencePiece's own."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

import opensora
from opensora.checkpoints import builder
from opensora.checkpoints.sentencepiece import parse_sentencepiece
from opensora.checkpoints.tokenizer import load_t5_tokenizer
from opensora.errors import WeightsError
from tests.full import FULL
from tests.tiny import TINY_SENTENCES, make_tiny_t5

SHIPPED = Path(opensora.__file__).parent / "embedded" / "text_encoder"
EXTRA = [f"<extra_id_{i}>" for i in range(100)]
SPECIAL = ("<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_99>", "<extra_id_100>", "<s>", "▁", "▁▁")
SPACES = " \t\n\r\v\f\x00\x01\x1c\x7f\x85\xa0\xad\u1680\u2003\u200b\u2028\u202f\u2060\u3000\ufeff"
WORDS = (
    *TINY_SENTENCES[2].split(),
    "naïve",
    "中文",
    "🎉",
    "ﬁne",
    "½",
    "Ａ",
    "＜pad＞",
    "<EXTRA_ID_3>",
    "e\u0301",
    "ẛ̣",
    "㍿",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_t5(tmp_path_factory.mktemp("t5"))


def their_tokenizer(folder: Path) -> Any:
    from transformers import T5TokenizerFast

    return T5TokenizerFast.from_pretrained(str(folder), local_files_only=True)


def save_as_json(folder: Path, target: Path) -> None:
    """The tokenizer of a folder in `target`, as transformers saves it: tokenizer.json and its configuration."""
    their_tokenizer(folder).save_pretrained(target)
    (target / "spiece.model").unlink(missing_ok=True)


def layouts(spiece: Path, folder: Path) -> dict[str, Path]:
    """The layouts in which folders of T5 are published, with one vocabulary."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spiece)).get_piece_size()
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "additional_special_tokens": EXTRA}
    added = {
        str(number): dict(content=token, lstrip=number > 2, rstrip=number > 2, normalized=False, special=True)
        for number, token in [*enumerate(SPECIAL[:3]), *((pieces + 99 - i, token) for i, token in enumerate(EXTRA))]
    }
    contents: dict[str, dict[str, Any]] = {
        "model alone": {},
        "no extra ids": {"tokenizer_config": {"extra_ids": 0, "tokenizer_class": "T5Tokenizer"}},
        "T5": {"special_tokens_map": special, "tokenizer_config": {**special, "extra_ids": 100}},
        "PixArt": {
            "added_tokens": {token: pieces + 99 - i for i, token in enumerate(EXTRA)}, "special_tokens_map": special,
            "tokenizer_config": {**special, "added_tokens_decoder": added, "extra_ids": 100, "legacy": True},
        },
    }  # fmt: skip
    for name, parts in contents.items():
        (folder / name).mkdir()
        shutil.copy(spiece, folder / name / "spiece.model")
        for part, content in parts.items():
            (folder / name / f"{part}.json").write_text(json.dumps(content))
    save_as_json(folder / "PixArt", folder / "tokenizer.json")
    return {name: folder / name for name in (*contents, "tokenizer.json")}


def random_text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randrange(25)):
        code = rng.choice((rng.randrange(1, 0x250), rng.randrange(0x250, 0xD800), rng.randrange(0xE000, 0x110000)))
        parts.append(
            rng.choice((rng.choice(WORDS), rng.choice(WORDS), rng.choice(SPECIAL), chr(code), rng.choice(SPACES)))
        )
    return rng.choice(("", " ", "\n")).join(parts)


@pytest.mark.parametrize("source", ["tiny", "shipped"])
def test_token_ids_equal_transformers(folder: Path, tmp_path: Path, source: str) -> None:
    """For every layout, random texts of spaces, control characters, special tokens and any other characters."""
    rng = random.Random(0)
    for name, made in layouts((folder if source == "tiny" else SHIPPED) / "spiece.model", tmp_path).items():
        ours, theirs = load_t5_tokenizer(made), their_tokenizer(made)
        assert (ours.vocab_size, ours.pad_id) == (theirs.vocab_size, theirs.pad_token_id)
        for text in ("", " ", *(random_text(rng) for _ in range(2000 if FULL else 200))):
            assert ours.encode(text) == theirs(text)["input_ids"], (name, text)


@pytest.mark.parametrize("source", ["tiny", "shipped"])
def test_token_ids_equal_sentencepiece(folder: Path, source: str) -> None:
    folder = SHIPPED if source == "shipped" else folder
    tokenizer = load_t5_tokenizer(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    assert tokenizer.vocab_size == pieces.get_piece_size()
    for text in (*TINY_SENTENCES, "", " ", "a  b", "x ,y", "naïve café", "中文 🎉", "ﬁne ½"):
        assert tokenizer.encode(text) == [*pieces.encode(text), pieces.eos_id()], text
    assert pieces.unk_id() not in tokenizer.encode(TINY_SENTENCES[0])


def test_pieces_and_scores_equal_sentencepiece(folder: Path) -> None:
    for file in (folder / "spiece.model", SHIPPED / "spiece.model"):
        found = parse_sentencepiece(file.read_bytes())
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
        ids = range(theirs.get_piece_size())
        assert found.pieces == [(theirs.id_to_piece(i), theirs.get_score(i)) for i in ids]
        assert len(found.charsmap) > 100_000


def test_damaged_models_are_refused(folder: Path) -> None:
    content = (folder / "spiece.model").read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        at = rng.randrange(len(content))
        for damaged in (
            content[:at],
            content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
            rng.randbytes(99),
        ):
            try:
                parse_sentencepiece(damaged)
            except (ValueError, KeyError):
                continue  # nothing else is raised
            assert len(damaged) > len(content) // 2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": {"type": "BPE", "vocab": {}}}, "model.type 'BPE' is not known"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "not a tokenizer of T5"),
        ({"model": {"type": "Unigram", "vocab": [["a", "b"]]}}, r"model.vocab\[0\]"),
        ({"model": {"type": "Unigram", "vocab": []}}, "not a tokenizer of T5"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "x"}}, "precompiled_charsmap is damaged"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": 3}}, "precompiled_charsmap is damaged"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "no usable T5"),
        ({"normalizer": {"type": "Sequence", "normalizers": [3]}}, "precompiled_charsmap is damaged"),
        ({"added_tokens": [{"id": 3}]}, "added_tokens"),
        ({"added_tokens": "x"}, "added_tokens"),
    ],
)
def test_wrong_values_of_a_tokenizer_json(folder: Path, tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    save_as_json(folder, tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(WeightsError, match=problem) as caught:
        builder.build_text_encoder({"type": "t5"}, tmp_path, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"spiece\.model or tokenizer\.json"):
        load_t5_tokenizer(tmp_path)


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "noise": lambda content: bytes(range(256)) * 4,
    "a pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n",
    "a page": lambda content: b"<!DOCTYPE html><html></html>",
    "an answer": lambda content: b"Entry not found",
    "no file": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_of_a_tokenizer_are_named(folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    if name == "tokenizer.json":
        save_as_json(folder, tmp_path)
    (tmp_path / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if DAMAGE[damage]:
        (tmp_path / name).write_bytes(DAMAGE[damage](content))
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(WeightsError, match=rf"{name}: ") as caught:
        builder.build_text_encoder({"type": "t5"}, tmp_path, torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert damage != "a pointer" or "run `git lfs pull`" in message


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    for vocab_size in (5, 50, 100):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": vocab_size}))
        with pytest.raises(WeightsError, match=rf"its tokenizer has .* tokens, its model {vocab_size}"):
            builder.build_text_encoder({"type": "t5"}, tmp_path, torch.float32)


@pytest.mark.parametrize(
    "name", ["spiece.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_the_hash_of_a_tokenizer_is_of_all_its_files(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    sha = builder.tokenizer_sha256(folder)
    assert builder.tokenizer_sha256(tmp_path) == builder.tokenizer_sha256(tmp_path / "model.safetensors") == sha
    (tmp_path / "notes.txt").write_text("decides nothing")
    assert builder.tokenizer_sha256(tmp_path) == sha
    with (tmp_path / name).open("a") as file:
        file.write(" ")
    assert builder.tokenizer_sha256(tmp_path) != sha and builder.tokenizer_sha256(None) == {}
