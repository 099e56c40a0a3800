"""Quantised weight files against bf16: peak memory of loading and running, error of the weights, and of a video.

python -m benchmarks.quantised_files [--layers 2] [--blocks 2] [--words 4096] [--prompts 2] [--formats bf16 int8 ...]
python -m benchmarks.quantised_files --layers 24 --words 32128 --blocks 28 --prompts 0 --formats bf16 int8 Q4_K

Memory is that of a T5-XXL encoder (16 tokens) and of an STDiT3-XL/2 (one evaluation of small latents) with random
weights, in a process of its own for each format. By default they have only some of their blocks and words. The second
command takes whole models, with files of up to 10 GB among the temporary ones. Errors are relative (Frobenius norm),
per layer of the embedded model; its videos are compared with those of its own weights by PSNR.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import opensora
from benchmarks import common
from opensora.acceleration.packed_tensor import PackedTensor, unpacked
from opensora.checkpoints import builder
from opensora.checkpoints.eight_bits import quantize_tensors, stored
from opensora.checkpoints.hub import locate
from opensora.checkpoints.read import read_state_dict
from opensora.models.sizes import size_conditioning
from opensora.models.stdit.stdit3 import STDiT3
from opensora.models.text_encoder import t5
from opensora.profiling.memory_meter import resident_memory

FORMATS = ("bf16", "int8", "fp8", "Q8_0", "Q5_K", "Q4_K")
T5_XXL = dict(vocab_size=32_128, d_model=4_096, d_kv=64, d_ff=10_240, num_heads=64, num_layers=24)
XL = dict(hidden_size=1_152, num_heads=16, depth=28, caption_channels=4_096, model_max_length=300)
EMBEDDED_DEPTH = 6
TOKENS = 16  # of the prompt
BLOCK = re.compile(r"(?<!t_)(blocks?)\.(\d+)\.")  # in the name of a tensor; t_block is no block
TOKENIZER = ("spiece.model", "tokenizer_config.json")
PROMPTS = ("a red circle moving right on a black background", "a large blue square growing on a white background")
CHILD = "import sys; from benchmarks.quantised_files import child; child(*sys.argv[1:])"


def quantize_k(rows: Tensor, bits: int) -> np.ndarray:
    """Rows in Q4_K or Q5_K (4 or 5 bits): the range of each 32 values in equal steps, without a search."""
    x = rows.float().reshape(-1, 8, 32)
    lowest = x.amin(-1).clamp(max=0)
    scales, minima = (x.amax(-1) - lowest).clamp(min=1e-9) / (2**bits - 1), -lowest
    d, dmin = (one.amax(1, keepdim=True).div(63).clamp(min=1e-7).half() for one in (scales, minima))
    sc, mn = ((one / unit.float()).round().clamp(0, 63).to(torch.uint8) for one, unit in ((scales, d), (minima, dmin)))
    step, offset = (d.float() * sc)[..., None], (dmin.float() * mn)[..., None]
    q = ((x + offset) / step.clamp(min=1e-9)).round().clamp(0, 2**bits - 1).to(torch.uint8)
    packed = [d.view(torch.uint8), dmin.view(torch.uint8)]
    packed += [sc[:, :4] | sc[:, 4:] >> 4 << 6, mn[:, :4] | mn[:, 4:] >> 4 << 6, sc[:, 4:] & 15 | (mn[:, 4:] & 15) << 4]
    if bits == 5:
        packed.append(((q >> 4) << torch.arange(8, dtype=torch.uint8)[:, None]).sum(1, dtype=torch.uint8))
    packed.append((q[:, 0::2] & 15 | (q[:, 1::2] & 15) << 4).flatten(1))
    return torch.cat(packed, 1).reshape(len(rows), -1).numpy()


def packed(tensor: Tensor, kind: str) -> tuple[np.ndarray, str] | None:
    """A matrix in a format of GGUF, or in Q8_0 where rows have no whole blocks of 256; None if it stays as it is."""
    if tensor.ndim != 2 or tensor.shape[1] % 32 or min(tensor.shape) < 128:
        return None
    if kind == "Q8_0" or tensor.shape[1] % 256:
        return gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType.Q8_0), "Q8_0"
    return quantize_k(tensor, int(kind[1])), kind


def _is_packed(name: str) -> bool:
    """Whether a tensor is one of the blocks' weights, or T5's embedding."""
    return name == "shared.weight" or ("block" in name and name.endswith("weight") and "t_block" not in name)


def by_block(state: dict[str, Any], depth: int) -> Iterator[dict[str, Any]]:
    """What is beside the blocks, then each of `depth` blocks; the last block of the state stands for all after it."""
    number = {name: int(found[2]) if (found := BLOCK.search(name)) else -1 for name in state}
    for block in range(-1, depth):
        source = min(block, max(number.values()))
        yield {BLOCK.sub(rf"\1.{block}.", name): one for name, one in state.items() if number[name] == source}


def write(state: dict[str, Tensor], folder: Path, kind: str, depth: int) -> None:
    """Writes the weights of a folder in a format; embedders and other matrices beside the blocks stay as they are."""
    if kind in ("int8", "fp8", "bf16"):
        _write_shards(state if kind == "bf16" else quantize_tensors(state, kind), folder, depth)
    else:
        _write_gguf(state, folder, kind, depth)


def _write_shards(tensors: dict[str, Tensor], folder: Path, depth: int) -> None:
    places = {}
    for number, part in enumerate(by_block(tensors, depth), start=1):
        file = f"model-{number:05d}-of-{depth + 1:05d}.safetensors"
        held = {name: tensor.contiguous() for name, tensor in stored(part).items()}
        save_file(held, folder / file)
        places |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def _write_gguf(state: dict[str, Tensor], folder: Path, kind: str, depth: int) -> None:
    writer = gguf.GGUFWriter(folder / "model.gguf", "model", use_temp_file=False)
    arrays = {name: _array(name, tensor, kind) for name, tensor in state.items()}
    for part in by_block(arrays, depth):
        for name, (array, raw_type, shape) in part.items():
            writer.add_tensor(name, array, raw_dtype=raw_type)
            if len(shape) > 4:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _array(name: str, tensor: Tensor, kind: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType | None, list[int]]:
    """What GGUF stores of a tensor: its bytes, their format (None: that of the array), and its shape."""
    shape = list(tensor.shape)
    if _is_packed(name) and (raw := packed(tensor, kind)) is not None:
        return raw[0], gguf.GGMLQuantizationType[raw[1]], shape
    flat = tensor.flatten(0, -4) if tensor.ndim > 4 else tensor
    return flat.half().contiguous().numpy(), None, shape


@torch.inference_mode()
def child(part: str, folder: str) -> None:
    """Loads and runs a text encoder or model, and prints the bytes that this added to the process at its peak."""
    torch.set_num_threads(1)
    path, cpu = Path(folder), torch.device("cpu")
    section: dict[str, Any] = {"type": "t5" if part == "text_encoder" else "STDiT3", "from_pretrained": folder}
    if part == "text_encoder":
        encoder = builder.build_text_encoder(section, path, torch.bfloat16)
        before = resident_memory()
        builder.load_text_encoder_weights(encoder, section, path, cpu)
        encoder.model([(torch.arange(TOKENS)[None], torch.ones(1, TOKENS, dtype=torch.long))])
    else:
        model = builder.build_model(section, path)
        before = resident_memory()
        builder.load_model_weights(model, section, path, cpu, torch.bfloat16)
        sizes = size_conditioning("STDiT2", 1, (64, 64), 17, 24, device=cpu)
        model(torch.randn(1, 4, 5, 8, 8).bfloat16(), torch.tensor([500.0]), y=torch.randn(1, 1, 60, 4096), **sizes)
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())  # ru_maxrss may be the parent's
    assert peak
    print(int(peak[1]) * 1024 - before)


def random_model(part: str, depth: int, words: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of two blocks in bf16, and the config.json of a model with `depth` of them."""
    torch.manual_seed(0)
    if part == "text_encoder":
        fixed = dict(relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6)
        config: dict[str, Any] = {**T5_XXL, **fixed, "feed_forward_proj": "gated-gelu", "vocab_size": words}
        model: Any = t5.T5EncoderModel(t5.T5Config(**{**config, "num_layers": 2}))
        config["num_layers"] = depth
    else:
        config = {**XL, "depth": depth, "model_type": "STDiT3", "qk_norm": True}
        model = STDiT3(**{key: value for key, value in config.items() if key != "model_type"} | {"depth": 2})
    for parameter in model.bfloat16().parameters():
        parameter.data.normal_(std=0.02)
    return {name: one.detach() for name, one in model.state_dict().items() if "embed_tokens" not in name}, config


def memory(part: str, depth: int, words: int, formats: Sequence[str]) -> dict[str, dict[str, int]]:
    """Format -> peak of loading and running a model of `depth` blocks, and the size of its file, in bytes."""
    state, config = random_model(part, depth, words)
    found = {}
    for kind in formats:
        with TemporaryDirectory() as folder:
            write(state, Path(folder), kind, depth)
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
            (Path(folder) / "config.json").write_text(json.dumps(config))
            for name in TOKENIZER:
                shutil.copy(locate("embedded:text_encoder") / name, folder)
            done = subprocess.run(
                [sys.executable, "-c", CHILD, part, folder], stdout=subprocess.PIPE, text=True, check=True
            )
            found[kind] = {"peak": int(done.stdout), "file": size}
            print(part, kind, found[kind], flush=True)
    return found


def quality(count: int, formats: Sequence[str]) -> dict[str, dict[str, float]]:
    """Format -> relative error of the layers of the embedded model, and PSNR (dB) of its videos against bf16."""
    source = locate("embedded:stdit3")
    exact = read_state_dict(source)
    videos = {}
    found: dict[str, dict[str, float]] = {}
    for kind in formats:
        with TemporaryDirectory() as folder:
            write(exact, Path(folder), kind, EMBEDDED_DEPTH)
            shutil.copy(source / "config.json", folder)
            held = read_state_dict(folder)
            small = [name for name, tensor in held.items() if isinstance(tensor, PackedTensor)]
            errors = [float((unpacked(held[n]) - exact[n].float()).norm() / exact[n].float().norm()) for n in small]
            pipe = opensora.load("embedded", device="cpu", ckpt_path=folder)
            videos[kind] = [pipe(prompt, seed=3).frames for prompt in PROMPTS[:count]]
        pairs = zip(videos[kind], videos["bf16"], strict=True)
        squares = [np.square(a.astype(float) - b.astype(float)).mean() for a, b in pairs]
        psnr = [10 * np.log10(255**2 / one) if one else np.inf for one in squares]
        found[kind] = {
            "layers": len(small), "mean_error": float(np.mean(errors or [0])), "max_error": max(errors, default=0.0),
            "psnr": float(np.mean(psnr)),
        }  # fmt: skip
        print(kind, found[kind], flush=True)
    return found


def main() -> None:
    given = common.arguments(__doc__, layers=2, blocks=2, words=4_096, prompts=2, formats=list(FORMATS))
    depths = {"text_encoder": given.layers, "model": given.blocks}
    formats = ["bf16", *(kind for kind in given.formats if kind != "bf16")]  # what the others are compared with
    report: dict[str, Any] = {part: memory(part, depth, given.words, formats) for part, depth in depths.items()}
    report["quality"] = quality(given.prompts, formats) if given.prompts else {}
    ratios = {
        f"{part}, {key}": {kind: one[key] / report[part]["bf16"][key] for kind, one in report[part].items()}
        for part in depths for key in ("peak", "file")
    }  # fmt: skip
    report["summary"] = {"ratios": ratios, "quality": report["quality"]}
    common.save("quantised_files", report, ratios, given.output, "of bf16")


if __name__ == "__main__":
    main()
