"""What a checkpoint holds, in a line: tensors, parameters, types, a hash of the content; and of which family it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch

from opensora.checkpoints.finite import not_finite
from opensora.checkpoints.hub import locate, read_config_json
from opensora.checkpoints.key_mapping import POSITIONS, TensorDict
from opensora.checkpoints.prefixes import adapter_names, common_prefix
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.text import dtype_name, first

NOT_PARAMETERS = ("y_embedder.y_embedding", *POSITIONS, "shift", "scale")
SHORT_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
# Each part is found in the name of some tensor; of several families that fit, the first counts.
FAMILIES = {
    "STDiT3 (Open-Sora 1.2)": ("spatial_blocks.", "temporal_blocks.", "fps_embedder."),
    "STDiT2 (Open-Sora 1.1)": (".attn_temp.", "t_block_temp.", "fl_embedder."),
    "STDiT (Open-Sora 1.0)": (".attn_temp.", "t_block.", "y_embedder."),
    "PixArt with sizes (PixArt-alpha 1024-MS)": ("csize_embedder.", "ar_embedder.", "t_block.", ".cross_attn."),
    "PixArt-Sigma with key and value compression": ("t_block.", ".cross_attn.", ".attn.sr."),
    "PixArt (alpha or Sigma)": ("t_block.", ".cross_attn.", "y_embedder."),
    "Latte": ("temp_embed", ".adaLN_modulation.", "y_embedder."),
    "DiT or Latte (the same names)": (".adaLN_modulation.", "y_embedder."),
    "video autoencoder (Open-Sora 1.2: per-frame and temporal)": ("spatial_vae.module.", "temporal_vae."),
    "temporal autoencoder (VAE_Temporal_SD)": ("encoder.block_res_blocks.", "decoder.block_res_blocks."),
    "video autoencoder (AutoencoderKLTemporalDecoder)": ("encoder.down_blocks.", "decoder.time_conv_out."),
    "per-frame autoencoder (AutoencoderKL)": ("encoder.down_blocks.", "decoder.up_blocks.", "quant_conv."),
    "T5 text encoder": ("encoder.block.0.layer.0.SelfAttention.",),
    "CLIP text encoder": ("embeddings.token_embedding.", "encoder.layers.0.self_attn.", "final_layer_norm."),
}


class Summary(NamedTuple):
    """What a checkpoint holds, before any rule or cast; `str` is one line."""

    path: Path
    tensors: int
    parameters: int  # without the known buffers
    dtypes: tuple[str, ...]
    sha256: str  # content_hash
    dropped: tuple[str, ...] = ()  # names that loading left out
    resized: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()  # (in the file, in the model)
    initial: tuple[str, ...] = ()  # of the model, left at their initial values (not strict)
    ignored: tuple[str, ...] = ()  # of the file, without a place in the model (not strict)
    stripped: tuple[str, ...] = ()  # what wrappers had put into all names

    def __str__(self) -> str:
        line = f"{self.path}: {self.tensors:,} tensors, {self.parameters:,} parameters, {'/'.join(self.dtypes)}"
        renamed = [" to ".join(pair) for pair in self.renamed]
        changes = {"stripped": self.stripped, "dropped": self.dropped, "resized": self.resized, "renamed": renamed}
        changes |= {"ignored": self.ignored, "left at initial values": self.initial}
        told = [f", {what} {first(names, 3)}" for what, names in changes.items() if names]
        return f"{line}, sha256 {self.sha256[:12]}{''.join(told)}"


def summarize(path: Path, tensors: TensorDict) -> Summary:
    """The summary of tensors read from `path`."""
    dtypes = {SHORT_DTYPES.get(name, name) for name in map(dtype_name, tensors.values())}
    return Summary(path, len(tensors), count_parameters(tensors), tuple(sorted(dtypes)), content_hash(tensors))


def count_parameters(tensors: TensorDict) -> int:
    """Elements of all tensors but the known buffers, which a file does not tell from parameters."""
    return sum(tensor.numel() for name, tensor in tensors.items() if not like(name, NOT_PARAMETERS))


def content_hash(tensors: TensorDict) -> str:
    """sha256 over each tensor's name, dtype, shape and sha256 of its bytes, by name: the same for any file format."""

    def entry(name: str) -> bytes:
        tensor = tensors[name]
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        head = f"{name}\0{dtype_name(tensor)}\0{','.join(map(str, tensor.shape))}\0"
        return head.encode(errors="surrogatepass") + hashlib.sha256(flat.numpy().data).digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(entry, sorted(tensors)))).hexdigest()


def family(names: Collection[str]) -> str:
    """The model family whose tensors these names are, or "unknown"."""
    if adapter_names(names):
        return "adapter (LoRA and its like), no model"
    fits = (title for title, parts in FAMILIES.items() if all(any(part in name for name in names) for part in parts))
    return next(fits, "unknown")


def inspect(source: str | os.PathLike[str], offline: bool = False) -> str:
    """Lines about a checkpoint: its summary, the type its config.json states, the family its names fit, what is odd."""
    path = locate(source, offline=offline)
    tensors, config = read_state_dict(path), read_config_json(path)
    stated = [f"config.json: {config[key]}" for key in ("type", "model_type", "_class_name") if config.get(key)]
    odd = []
    if prefix := common_prefix(tensors):
        odd.append(f"all names begin with: {first([prefix])}")
    if broken := not_finite(tensors):
        odd.append(f"not finite: {first(broken)}")
    return "\n".join([str(summarize(path, tensors)), *stated[:1], f"family: {family(tensors)}", *odd])


def like(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is like one of some patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
