"""GGUF files for tests, written by the `gguf` package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import torch
from torch import Tensor

from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.sentencepiece import parse_sentencepiece
from tests.tiny import make_tiny_t5

LLAMA_CPP = {  # names in a T5 checkpoint -> names in llama.cpp's files
    "shared.weight": "token_embd.weight",
    "encoder.final_layer_norm.weight": "enc.output_norm.weight",
    ".layer.0.SelfAttention.relative_attention_bias.": ".attn_rel_b.",
    **{f".layer.0.SelfAttention.{name}.": f".attn_{name}." for name in "qkvo"},
    ".layer.0.layer_norm.": ".attn_norm.",
    ".layer.1.layer_norm.": ".ffn_norm.",
    ".layer.1.DenseReluDense.wi_0.": ".ffn_gate.",
    ".layer.1.DenseReluDense.wi_1.": ".ffn_up.",
    ".layer.1.DenseReluDense.wo.": ".ffn_down.",
    "encoder.block.": "enc.blk.",
}


def random_blocks(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows [rows, bytes] of random blocks of a format, with finite scales of moderate size."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    halves = {"Q6_K": [208], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}.get(name, [0])
    for at in halves:
        raw[..., at + 1] = raw[..., at + 1] & 0x83 | 0x14  # about 1e-3
    return raw.reshape(rows, -1)


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor | tuple[np.ndarray, str]],
    architecture: str = "model",
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """A file of tensors (F32, F16 or BF16 by dtype) and of raw rows with the name of their format."""
    writer = gguf.GGUFWriter(path, architecture)
    more(writer)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=gguf.GGMLQuantizationType[tensor[1]])
        elif tensor.dtype == torch.bfloat16:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(tensor: Tensor, name: str) -> tuple[np.ndarray, str]:
    """A tensor in a format that the `gguf` package can write."""
    return gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[name]), name


def llama_cpp_name(name: str) -> str:
    for ours, theirs in LLAMA_CPP.items():
        name = name.replace(ours, theirs)
    return name


def write_t5_gguf(source: Path, path: Path, format: str, config: Mapping[str, float], tokenizer: bool = True) -> Path:
    """A T5 encoder's folder as llama.cpp's converter writes it: matrices in `format`, the rest in F32."""
    state = {name: tensor for name, tensor in read_state_dict(source).items() if "embed_tokens" not in name}
    tensors = {
        llama_cpp_name(name): quantized(tensor, format) if tensor.ndim == 2 and "bias" not in name else tensor.float()
        for name, tensor in state.items()
    }

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_embedding_length(config["d_model"])
        writer.add_feed_forward_length(config["d_ff"])
        writer.add_block_count(config["num_layers"])
        writer.add_head_count(config["num_heads"])
        writer.add_key_length(config["d_kv"])
        writer.add_relative_attn_buckets_count(32)
        writer.add_layer_norm_rms_eps(1e-6)
        if tokenizer:
            add_tokenizer(writer, source / "spiece.model", len(state["shared.weight"]))

    return write_gguf(path, tensors, "t5encoder", metadata)


def tiny_t5_gguf(path: Path) -> None:
    """`make_tiny_t5` as one file."""
    with TemporaryDirectory() as folder:
        source = make_tiny_t5(Path(folder) / "t5")
        write_t5_gguf(source, path, "Q8_0", json.loads((source / "config.json").read_text()))


def add_tokenizer(writer: gguf.GGUFWriter, pieces: Path, vocab_size: int) -> None:
    """The tokenizer of a spiece.model, filled up to the rows of the embedding."""
    model = parse_sentencepiece(pieces.read_bytes())
    unused = vocab_size - len(model.pieces)
    kinds = [3, 3, 2] + [1] * (len(model.pieces) - 3) + [5] * unused
    writer.add_tokenizer_model("t5")
    writer.add_token_list([piece for piece, _ in model.pieces] + [f"[PAD{i}]" for i in range(unused)])
    writer.add_token_scores([score for _, score in model.pieces] + [-1000.0] * unused)
    writer.add_token_types(kinds)
    if model.charsmap:
        writer.add_precompiled_charsmap(model.charsmap)
