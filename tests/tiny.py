"""Tiny checkpoints in the published layouts, made on the spot: small enough for any test, no file to keep."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch

TINY_SENTENCES = (
    "a red circle moving left on a black background",
    "a beautiful sunset over the city, 4k",
    "the quick brown fox jumps over the lazy dog, and then it sleeps; why not?",
    "waves of the sea roll slowly towards the beach at dawn.",
    "0123456789 abcdefghijklmnopqrstuvwxyz !\"#$%&'()*+-/:<=>@[]^_`{|}~",
)


def make_tiny_t5(folder: Path, hidden: int = 32, seed: int = 0) -> Path:
    """A T5 encoder of 2 layers with random weights and its tokenizer, as DeepFloyd/t5-v1_1-xxl lays them out."""
    from safetensors.torch import save_file
    from transformers import T5Config, T5EncoderModel

    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = _make_tokenizer(folder)
    config = T5Config(
        vocab_size=vocab_size,
        d_model=hidden,
        d_kv=hidden // 2,
        d_ff=2 * hidden,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        architectures=["T5EncoderModel"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5EncoderModel(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "encoder.embed_tokens.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_diff_dict()))
    return folder


def _make_tokenizer(folder: Path) -> int:
    """spiece.model and tokenizer_config.json of a unigram tokenizer with T5's special ids; its number of pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TINY_SENTENCES * 4),
        model_writer=model,
        model_type="unigram",
        vocab_size=160,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
