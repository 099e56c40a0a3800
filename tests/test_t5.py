from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

import opensora
from opensora.checkpoints import builder
from opensora.checkpoints.fit import load_weights
from opensora.errors import WeightsError
from opensora.models.text_encoder.t5 import T5Encoder, load_t5_tokenizer, make_t5
from tests.tiny import TINY_SENTENCES, make_tiny_t5

SHIPPED = Path(opensora.__file__).parent / "embedded" / "text_encoder"
needs_shipped = pytest.mark.skipif(not SHIPPED.is_dir(), reason="the embedded text encoder has not been trained")


def load(folder: Path, **options) -> T5Encoder:
    encoder = make_t5(json.loads((folder / "config.json").read_text()), folder, **options)
    load_weights(encoder.model, folder)
    return encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def tiny(folder: Path) -> T5Encoder:
    return load(folder)


@pytest.mark.parametrize("source", ["tiny", pytest.param("shipped", marks=needs_shipped)])
def test_token_ids_equal_sentencepiece(folder: Path, source: str) -> None:
    folder = SHIPPED if source == "shipped" else folder
    tokenizer = load_t5_tokenizer(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    assert len(tokenizer) == pieces.get_piece_size()
    for text in (*TINY_SENTENCES, "", " ", "a  b", "x ,y", "naïve café", "中文 🎉", "ﬁne ½"):
        assert tokenizer(text)["input_ids"] == [*pieces.encode(text), pieces.eos_id()], text
    assert pieces.unk_id() not in tokenizer(TINY_SENTENCES[0])["input_ids"]


def test_tokenizer_json_alone_gives_the_same_ids(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_t5_tokenizer(folder)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "spiece.model").unlink(missing_ok=True)
    again = load_t5_tokenizer(tmp_path)
    assert all(again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TINY_SENTENCES)


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
        load_t5_tokenizer(folder).save_pretrained(tmp_path)
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
    assert "tiktoken" not in message and "\n" not in message
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


def test_padding_takes_part_in_nothing(tiny: T5Encoder) -> None:
    short, long = TINY_SENTENCES[0], TINY_SENTENCES[2]
    alone, mask = tiny.encode([short])
    assert alone.dtype == torch.float32 and mask.dtype == torch.int64
    assert alone.shape == (1, 1, mask.shape[1], tiny.output_dim) and mask.all()
    both, both_mask = tiny.encode([short, long])
    length = mask.shape[1]
    assert both.shape[2] == len(tiny.tokenizer(long)["input_ids"]) > length
    assert both_mask.sum(1).tolist() == [length, both.shape[2]]
    torch.testing.assert_close(both[:1, :, :length], alone, atol=1e-5, rtol=0)
    assert not both[0, :, length:].any()


def test_equals_transformers(tiny: T5Encoder, folder: Path) -> None:
    from transformers import T5EncoderModel

    reference = T5EncoderModel.from_pretrained(folder, local_files_only=True).eval()
    tokens = tiny.tokenizer(TINY_SENTENCES[0], return_tensors="pt")
    expected = reference(input_ids=tokens.input_ids).last_hidden_state
    torch.testing.assert_close(tiny.encode([TINY_SENTENCES[0]])[0][:, 0], expected)


def test_a_long_prompt_is_cut_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = load(folder, model_max_length=5)
    with caplog.at_level(logging.WARNING):
        features, mask = encoder.encode([TINY_SENTENCES[2]])
    assert features.shape[2] == mask.sum() == 5
    assert "the quick brown fox" in caplog.text and "first 5" in caplog.text


def test_dtypes(folder: Path) -> None:
    encoder = load(folder, dtype=torch.float16)
    half = encoder.model
    assert half.shared.weight is half.encoder.embed_tokens.weight
    assert all((value.dtype == torch.float32) == (".wo." in name) for name, value in half.state_dict().items())
    assert encoder.encode(["a dog"])[0].isfinite().all()
    assert load(folder, dtype=torch.bfloat16).encode(["a dog"])[0].dtype == torch.float32


@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_full_checkpoints_and_either_name_of_the_embedding(
    tiny: T5Encoder, folder: Path, tmp_path: Path, embedding: str
) -> None:
    state = load_file(folder / "model.safetensors")
    table = state.pop("shared.weight")
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        if embedding in (name, "both"):
            state[name] = table.clone()
    state |= {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
    for name in ("config.json", "spiece.model", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).encode(["a red circle"])[0], tiny.encode(["a red circle"])[0])


@needs_shipped
def test_shipped_encoder_tells_attributes_apart() -> None:
    encoder = load(SHIPPED)
    base = "a red circle moving left on a black background"
    others = [base.replace(*pair) for pair in (("red", "blue"), ("circle", "square"), ("left", "right"))]
    others.append(base.replace("black", "dark green"))
    same = base.replace("moving", "going")
    features, mask = encoder.encode([base, same, *others])
    mean = features[:, 0].sum(1) / mask.sum(1, keepdim=True)
    distance = (mean - mean[0]).norm(dim=1)
    assert distance[2:].min() > 2 * distance[1]
    assert 0.9 < features[:, 0][mask.bool()].square().mean().sqrt() < 1.1


@needs_shipped
@pytest.mark.parametrize("text", ["", " ", "zxqv flumph 123!", "中文 🎉", "A CAT in the Garden"])
def test_shipped_encoder_takes_any_text(text: str) -> None:
    features, mask = load(SHIPPED).encode([text])
    assert features.isfinite().all() and mask.all() and features.shape[2] >= 1


@needs_shipped
def test_shipped_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 3_000_000
