"""Checkpoints in and out: read, check, fit to a model, summarise, write. The only module that opens weight files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file as save_safetensors
from torch import Tensor, nn

from opensora.errors import WeightsError
from opensora.files import replacing
from opensora.hub import INDEX, SUFFIXES, checkpoint_files, locate, one_line, read_config_json
from opensora.weight_rules import DEFAULT_RULES, POSITIONS, Drop, Rule, TensorDict

logger = logging.getLogger("opensora")
_replacing = partial(replacing, make_folders=True, error=WeightsError, failures=(RuntimeError, SafetensorError))
WRAPPERS = ("state_dict", "ema", "model", "module")
KEPT_IN_FLOAT32 = ("rope.freqs", "*.rope.freqs", *POSITIONS, "shift", "scale")
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


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensor name -> tensor on the CPU, read lazily where the format allows, of a file, an index or a folder.

    Reads .safetensors, and .pt, .pth, .bin without running any code they hold; a state dict that lies under
    `state_dict`, `ema`, `model` or `module` is unwrapped. Raises WeightsError naming the file.
    """
    tensors: dict[str, Tensor] = {}
    for file, promised in checkpoint_files(Path(path)).items():
        found = _read_file(file)
        if absent := [name for name in promised if name not in found]:
            raise WeightsError(f"{file}: lacks tensors that the index promises: {_first(absent)}; copy it again")
        tensors.update(found)
    return tensors


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix not in SUFFIXES:
        raise WeightsError(f"{file}: not a weight file; known are {', '.join(SUFFIXES)} and index files")
    safe = file.suffix == ".safetensors"
    try:
        if safe:
            return load_safetensors(file)
        payload = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(error, pickle.UnpicklingError) and (asked := re.search(r"GLOBAL (\S+)|class (\S+)", str(error))):
            raise WeightsError(
                f"{file}: refused, it asks to run code ({(asked[1] or asked[2]).strip('`.')}); "
                "only files that hold nothing but tensors are loaded, best as .safetensors"
            ) from error
        kind = "safetensors file" if safe else "PyTorch checkpoint"
        raise WeightsError(f"{file}: truncated, damaged or no {kind} ({one_line(error)})") from error
    while isinstance(payload, dict) and (key := next((k for k in WRAPPERS if isinstance(payload.get(k), dict)), None)):
        payload = payload[key]
    if not isinstance(payload, dict) or not payload:
        raise WeightsError(f"{file}: holds a {type(payload).__name__}, not a state dict (tensors by name)")
    for name, value in payload.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{file}: not a state dict: entry '{name}' is a {type(value).__name__}, not a tensor")
    return dict(payload)


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

    def __str__(self) -> str:
        line = f"{self.path}: {self.tensors:,} tensors, {self.parameters:,} parameters, {'/'.join(self.dtypes)}"
        renamed = [" to ".join(pair) for pair in self.renamed]
        changes = {"dropped": self.dropped, "resized": self.resized, "renamed": renamed, "ignored": self.ignored}
        changes["left at initial values"] = self.initial
        told = [f", {what} {_first(names, 3)}" for what, names in changes.items() if names]
        return f"{line}, sha256 {self.sha256[:12]}{''.join(told)}"


def summarize(path: Path, tensors: TensorDict) -> Summary:
    """The summary of tensors read from `path`."""
    dtypes = {SHORT_DTYPES.get(name, name) for name in map(_dtype_name, tensors.values())}
    return Summary(path, len(tensors), count_parameters(tensors), tuple(sorted(dtypes)), content_hash(tensors))


def count_parameters(tensors: TensorDict) -> int:
    """Elements of all tensors but the known buffers, which a file does not tell from parameters."""
    return sum(tensor.numel() for name, tensor in tensors.items() if not _like(name, NOT_PARAMETERS))


def content_hash(tensors: TensorDict) -> str:
    """sha256 over each tensor's name, dtype, shape and sha256 of its bytes, by name: the same for any file format."""

    def entry(name: str) -> bytes:
        tensor = tensors[name]
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        head = f"{name}\0{_dtype_name(tensor)}\0{','.join(map(str, tensor.shape))}\0"
        return head.encode() + hashlib.sha256(flat.numpy().data).digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(entry, sorted(tensors)))).hexdigest()


def family(names: Collection[str]) -> str:
    """The model family whose tensors these names are, or "unknown"."""
    fits = (title for title, parts in FAMILIES.items() if all(any(part in name for name in names) for part in parts))
    return next(fits, "unknown")


def inspect(source: str | os.PathLike[str]) -> str:
    """Lines about a checkpoint: its summary, the type its config.json states, and the family its names fit."""
    path = locate(source)
    tensors, config = read_state_dict(path), read_config_json(path)
    stated = [f"config.json: {config[key]}" for key in ("type", "model_type", "_class_name") if config.get(key)]
    return "\n".join([str(summarize(path, tensors)), *stated[:1], f"family: {family(tensors)}"])


def kept_in_float32(name: str) -> bool:
    """True for tensors that round badly in half precision: rotary frequencies, positions, latent statistics."""
    return _like(name, KEPT_IN_FLOAT32)


def load_weights(
    model: nn.Module, source: str | os.PathLike[str], *, rules: Sequence[Rule] = (), dtype: torch.dtype | None = None,
    strict: bool = True,
) -> Summary:  # fmt: skip
    """Fills every tensor of `model` from a file, folder or hub id, and returns what was read.

    `rules` apply before DEFAULT_RULES. Floating tensors become `dtype`, or the model's own dtype when None, save those
    `kept_in_float32`. Tensors on the meta device are replaced by the file's (non-persistent buffers stay as they
    are), any others have their values overwritten in place; fixed positions are the model's own `positions()`.
    Nothing is changed before everything fits. Unless `strict`, tensors that the file lacks stay as they are (the model
    must not be on the meta device) and those that the model lacks are ignored; summary and log tell of both.
    Raises WeightsError naming each tensor that is missing, unexpected or of another shape.
    """
    path = locate(source, what=f"{type(model).__name__} weights")
    found = read_state_dict(path)
    tensors, changes = fit(model, found, path, rules, strict)
    own = model.state_dict(keep_vars=True)
    if nowhere := [name for name in changes["initial"] if own[name].is_meta]:
        raise RuntimeError(f"strict=False needs a model with initial values, not on the meta device: {_first(nowhere)}")
    _fill(model, own, tensors, dtype)
    summary = summarize(path, found)._replace(**changes)
    if summary.initial or summary.ignored:
        logger.warning("%s is not a whole %s", summary, type(model).__name__)
    return summary


def fit(
    model: nn.Module, file: TensorDict, path: Path, rules: Sequence[Rule] = (), strict: bool = True
) -> tuple[dict[str, Tensor], dict[str, tuple]]:
    """What a file and its own fixed positions give `model`, by the model's names; and what a Summary says of it.

    The model may lie on the meta device, and is not changed. Arguments and errors as in `load_weights`.
    """
    own = model.state_dict(keep_vars=True)
    rules = (*rules, *DEFAULT_RULES)
    active = [rule for rule in rules if rule.applies(file, own)]
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for old, tensor in file.items():
        entry = (old, tensor)
        for rule in active:
            entry = entry and rule.load(*entry, own)
        if entry:
            tensors[entry[0]], origin[entry[0]] = entry[1], old
    placed = {name: tensor for name, tensor in tensors.items() if name in own}
    by_holder = {id(own[name]): tensor for name, tensor in placed.items()}
    tied = {name: by_holder[id(mine)] for name, mine in own.items() if id(mine) in by_holder}  # stored under any name
    with torch.device("cpu"):  # wherever the model is
        filled = {**getattr(model, "positions", dict)(), **tied, **placed}
    kept = [
        name for name in own if not own[name].is_meta and any(r.matches(name) for r in rules if isinstance(r, Drop))
    ]
    missing = [name for name in own if name not in filled and name not in kept]
    unexpected = [name for name in tensors if name not in own]
    misfits = [name for name in placed if not _fits(placed[name], own[name])]
    problems = [f"{name}: expected {_shape(own[name])}, found {_shape(placed[name])}" for name in misfits]
    if strict or not placed:
        problems += [f"missing {name} {_shape(own[name])}" for name in missing]
        problems += [f"unexpected {name} {_shape(tensors[name])}" for name in unexpected]
    if problems:
        raise WeightsError(f"{path} does not fit {type(model).__name__}: {_first(problems, separator='; ')}")
    return filled, {
        "dropped": tuple(sorted({*file}.difference(origin.values()))),
        "resized": tuple(name for name, old in origin.items() if tensors[name].shape != file[old].shape),
        "renamed": tuple((old, name) for name, old in origin.items() if name != old),
        "initial": tuple(missing), "ignored": tuple(unexpected),
    }  # fmt: skip


def _fill(model: nn.Module, own: TensorDict, tensors: TensorDict, dtype: torch.dtype | None) -> None:
    replaced: dict[str, Tensor] = {}
    made: dict[int, nn.Parameter] = {}  # so that tied parameters stay one
    for name, mine in own.items():
        wanted = mine.dtype
        if mine.is_floating_point():
            wanted = torch.float32 if kept_in_float32(name) else dtype or mine.dtype
        if not mine.is_meta:
            mine.data = mine.data.to(wanted)
            if name in tensors:
                mine.data.copy_(tensors[name])
        elif isinstance(mine, nn.Parameter):
            replaced[name] = made.setdefault(id(mine), nn.Parameter(tensors[name].to(wanted), mine.requires_grad))
        else:
            replaced[name] = tensors[name].to(wanted)
    model.load_state_dict(replaced, strict=False, assign=True)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts that a .safetensors file holds beside its tensors. Raises WeightsError naming the file."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: truncated, damaged or no safetensors file ({one_line(error)})") from error


def save_file(state_dict: TensorDict, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors to one .safetensors, .pt, .pth or .bin file; the file appears whole or not at all.

    A .safetensors file also takes texts as `metadata`.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"{path}: cannot write this kind of file; known are {', '.join(SUFFIXES)}")
    with _replacing(path) as [temporary]:
        _write(state_dict, temporary, metadata)


def save_pretrained(
    state_dict: TensorDict, folder: str | os.PathLike[str], config: Mapping[str, Any], max_shard_bytes: int = 5 * 2**30
) -> None:
    """Writes config.json and model.safetensors, or an index and shards of at most `max_shard_bytes` (or one tensor).

    Files appear under their names only once all of them are written. Weights saved there before are replaced.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    plan = split_torch_state_dict_into_shards(dict(state_dict), max_shard_size=max_shard_bytes)
    documents: dict[str, Mapping[str, Any]] = {"config.json": config}
    if plan.is_sharded:
        documents[f"model.safetensors{INDEX}"] = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    with ExitStack() as files:
        for name, document in documents.items():
            text = json.dumps(dict(document), indent=2) + "\n"
            files.enter_context(_replacing(folder / name))[0].write_text(text, encoding="utf-8")
        for name, held in plan.filename_to_tensors.items():
            _write({tensor: state_dict[tensor] for tensor in held}, files.enter_context(_replacing(folder / name))[0])
    for file in folder.glob("model*.safetensors*"):
        ours = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", file.name)
        if ours and file.name not in documents and file.name not in plan.filename_to_tensors:
            file.unlink()


def _write(tensors: TensorDict, file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes copies, of which no two share memory and none drags a larger storage along."""
    options: dict[str, Any] = {"copy": True, "memory_format": torch.contiguous_format}
    copies = {name: tensor.detach().to("cpu", **options) for name, tensor in tensors.items()}
    if file.suffix == ".safetensors":
        save_safetensors(copies, file, metadata={"format": "pt", **(metadata or {})})
    else:
        torch.save(copies, file)


def _like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _fits(found: Tensor, mine: Tensor) -> bool:
    return found.shape == mine.shape and found.is_floating_point() == mine.is_floating_point()


def _shape(tensor: Tensor) -> str:
    return f"{_dtype_name(tensor)} [{', '.join(map(str, tensor.shape))}]"


def _first(words: Sequence[str], limit: int = 10, separator: str = ", ") -> str:
    more = f"{separator}and {len(words) - limit:,} more" if len(words) > limit else ""
    return separator.join(words[:limit]) + more
