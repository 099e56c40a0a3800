"""Quantised weight files against bf16: peak memory of loading and running, error of the weights, and of a video.

python -m benchmarks.quantised_files [--layers 2] [--blocks 2] [--prompts 2] [--output results]

Memory is that of a T5-XXL encoder (64 tokens) and of an STDiT3-XL/2 (one evaluation of small latents) with random
weights of their published sizes but only some of their blocks and words, in a process of its own for each format; the
files of the whole models are counted from the bytes of a block and a word. Errors are relative (Frobenius norm), per
layer of the embedded model; its videos are compared with those of its own weights by PSNR.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
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
WORDS = 4_096  # of the vocabulary
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


def write(state: dict[str, Tensor], folder: Path, kind: str) -> None:
    """Writes the weights of a folder in a format; embedders and other matrices beside the blocks stay as they are."""
    if kind in ("int8", "fp8", "bf16"):
        tensors = state if kind == "bf16" else stored(quantize_tensors(state, kind))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return
    writer = gguf.GGUFWriter(folder / "model.gguf", "model", use_temp_file=False)
    for name, tensor in state.items():
        raw = packed(tensor, kind) if _is_packed(name) else None
        if raw is not None:
            writer.add_tensor(name, raw[0], raw_dtype=gguf.GGMLQuantizationType[raw[1]])
        else:
            if tensor.ndim > 4:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
                tensor = tensor.flatten(0, -4)
            writer.add_tensor(name, tensor.half().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
        encoder.model([(torch.arange(64)[None], torch.ones(1, 64, dtype=torch.long))])
    else:
        model = builder.build_model(section, path)
        before = resident_memory()
        builder.load_model_weights(model, section, path, cpu, torch.bfloat16)
        sizes = size_conditioning("STDiT2", 1, (64, 64), 17, 24, device=cpu)
        model(torch.randn(1, 4, 5, 8, 8).bfloat16(), torch.tensor([500.0]), y=torch.randn(1, 1, 60, 4096), **sizes)
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())  # ru_maxrss may be the parent's
    assert peak
    print(int(peak[1]) * 1024 - before)


def memory(part: str, blocks: int) -> dict[str, dict[str, float]]:
    """Format -> measured peak of a model with `blocks` blocks, and bytes of the whole model's file, counted."""
    torch.manual_seed(0)
    if part == "text_encoder":
        fixed = dict(relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6)
        config: dict[str, Any] = {**T5_XXL, **fixed, "feed_forward_proj": "gated-gelu"}
        config |= {"num_layers": blocks, "vocab_size": WORDS}
        model: Any = t5.T5EncoderModel(t5.T5Config(**config)).bfloat16()
        whole, marks = T5_XXL["num_layers"], (".block.",)
    else:
        config = {**XL, "depth": blocks, "model_type": "STDiT3", "qk_norm": True}
        model = STDiT3(**{key: value for key, value in config.items() if key != "model_type"}).bfloat16()
        whole, marks = XL["depth"], ("spatial_blocks.", "temporal_blocks.")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    found = {}
    for kind in FORMATS:
        with TemporaryDirectory() as folder:
            write(state, Path(folder), kind)
            (Path(folder) / "config.json").write_text(json.dumps(config))
            for name in TOKENIZER:
                shutil.copy(locate("embedded:text_encoder") / name, folder)
            held = read_state_dict(next(Path(folder).glob("model.*")))
            size = {
                n: sum(one.nbytes for one in t.parts()) if isinstance(t, PackedTensor) else t.nbytes
                for n, t in held.items()
            }
            in_blocks = sum(bytes_ for name, bytes_ in size.items() if any(mark in name for mark in marks))
            counted = sum(size.values()) + in_blocks / blocks * (whole - blocks)
            counted += size.get("shared.weight", 0) * (T5_XXL["vocab_size"] / WORDS - 1)
            done = subprocess.run(
                [sys.executable, "-c", CHILD, part, folder], stdout=subprocess.PIPE, text=True, check=True
            )
            found[kind] = {"peak": int(done.stdout), "file": sum(size.values()), "whole_file": counted}
            print(part, kind, found[kind], flush=True)
    return found


def quality(count: int) -> dict[str, dict[str, float]]:
    """Format -> relative error of the layers of the embedded model, and PSNR (dB) of its videos."""
    source = locate("embedded:stdit3")
    exact = read_state_dict(source)
    videos = {}
    found: dict[str, dict[str, float]] = {}
    for kind in FORMATS:
        with TemporaryDirectory() as folder:
            write(exact, Path(folder), kind)
            shutil.copy(source / "config.json", folder)
            held = read_state_dict(next(Path(folder).glob("model.*")))
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
    given = common.arguments(__doc__, layers=2, blocks=2, prompts=2)
    report: dict[str, Any] = {part: memory(part, blocks) for part, blocks in
                              (("text_encoder", given.layers), ("model", given.blocks))}  # fmt: skip
    report["quality"] = quality(given.prompts)
    ratios = {
        f"{part}, {key}": {kind: one[key] / report[part]["bf16"][key] for kind, one in report[part].items()}
        for part in ("text_encoder", "model") for key in ("peak", "whole_file")
    }  # fmt: skip
    report["summary"] = {"ratios": ratios, "quality": report["quality"]}
    common.save("quantised_files", report, ratios, given.output, "of bf16")


if __name__ == "__main__":
    main()
