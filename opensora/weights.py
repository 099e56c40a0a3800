"""Checkpoints in and out: read, check, fit to a model, summarise, write. The only module that opens weight files."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file as save_safetensors
from torch import Tensor, nn

from opensora.errors import WeightsError
from opensora.hub import INDEX, STEMS, SUFFIXES, checkpoint_files, locate, one_line, read_config_json
from opensora.weight_rules import DEFAULT_RULES, Drop, ResizeRows, Rule, TensorDict

WRAPPERS = ("state_dict", "ema", "model", "module")
POSITIONS = ("pos_embed", "pos_embed_temporal", "pos_embed_spatial")
KEPT_IN_FLOAT32 = ("rope.freqs", "*.rope.freqs", *POSITIONS, "shift", "scale")
NOT_PARAMETERS = ("y_embedder.y_embedding", *POSITIONS, "shift", "scale")
SHORT_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
FAMILIES = {
    "STDiT3 (Open-Sora 1.2)": ("spatial_blocks.", "temporal_blocks.", "fps_embedder."),
    "video autoencoder (Open-Sora 1.2: per-frame and temporal)": ("spatial_vae.module.", "temporal_vae."),
    "temporal autoencoder (VAE_Temporal_SD)": ("encoder.block_res_blocks.", "decoder.block_res_blocks."),
    "per-frame autoencoder (AutoencoderKL)": ("encoder.down_blocks.", "decoder.up_blocks.", "quant_conv."),
    "T5 text encoder": ("encoder.block.0.layer.0.SelfAttention.",),
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
    if file.suffix != ".safetensors":
        return _state_dict_in(_unpickle(file), file)
    try:
        return load_safetensors(file)
    except Exception as error:
        raise WeightsError(f"{file}: truncated, damaged or no safetensors file ({one_line(error)})") from error


def _unpickle(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(error, pickle.UnpicklingError) and (asked := re.search(r"GLOBAL (\S+)|class (\S+)", str(error))):
            raise WeightsError(
                f"{file}: refused, it asks to run code ({(asked[1] or asked[2]).strip('`.')}); "
                "only files that hold nothing but tensors are loaded, best as .safetensors"
            ) from error
        raise WeightsError(f"{file}: truncated, damaged or no PyTorch checkpoint ({one_line(error)})") from error


def _state_dict_in(payload: Any, file: Path) -> dict[str, Tensor]:
    """The tensors of a loaded payload, unwrapped."""
    while isinstance(payload, dict) and (key := next((k for k in WRAPPERS if isinstance(payload.get(k), dict)), None)):
        payload = payload[key]
    if not isinstance(payload, dict) or not payload:
        raise WeightsError(f"{file}: holds a {type(payload).__name__}, not a state dict (tensors by name)")
    for name, value in payload.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{file}: not a state dict: entry '{name}' is a {type(value).__name__}, not a tensor")
    return dict(payload)


@dataclass(frozen=True)
class Summary:
    """What a checkpoint holds, before any rule or cast; `str` is one line.

    `parameters` leaves out the known buffers; `sha256` is `content_hash`. The last three name what loading left out
    of the file, resized, and left at the model's own values.
    """

    path: Path
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    sha256: str
    dropped: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        line = f"{self.path}: {self.tensors:,} tensors, {self.parameters:,} parameters, {'/'.join(self.dtypes)}"
        line += f", sha256 {self.sha256[:12]}"
        for did in ("dropped", "resized", "missing"):
            if names := getattr(self, did):
                line += f", {did} {_first(names, 3)}"
        return line


def summarize(path: Path, tensors: TensorDict) -> Summary:
    """The summary of tensors read from `path`."""
    dtypes = sorted({SHORT_DTYPES.get(tensor.dtype, _dtype_name(tensor)) for tensor in tensors.values()})
    return Summary(path, len(tensors), count_parameters(tensors), tuple(dtypes), content_hash(tensors))


def count_parameters(tensors: TensorDict) -> int:
    """Elements of all tensors but the known buffers, which a file does not tell from parameters."""
    return sum(tensor.numel() for name, tensor in tensors.items() if not _like(name, NOT_PARAMETERS))


def content_hash(tensors: TensorDict) -> str:
    """sha256 over each tensor's name, dtype, shape and sha256 of its bytes, by name: the same for any file format."""
    names = sorted(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = pool.map(lambda name: _sha256(tensors[name]), names)
        total = hashlib.sha256()
        for name, value in zip(names, hashes, strict=True):
            head = f"{name}\0{_dtype_name(tensors[name])}\0{','.join(map(str, tensors[name].shape))}\0"
            total.update(head.encode() + value)
    return total.hexdigest()


def _sha256(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()


def family(names: Iterable[str]) -> str:
    """The model family whose tensors these names are, or "unknown"."""
    names = list(names)
    for title, parts in FAMILIES.items():
        if all(any(part in name for name in names) for part in parts):
            return title
    return "unknown"


def inspect(source: str | os.PathLike[str]) -> str:
    """Lines about a checkpoint: its summary, the type its config.json states, and the family its names fit."""
    path = locate(source)
    tensors = read_state_dict(path)
    config = read_config_json(path)
    stated = next((config[key] for key in ("type", "model_type", "_class_name") if key in config), None)
    lines = [str(summarize(path, tensors)), f"config.json: {stated}" if stated else "", f"family: {family(tensors)}"]
    return "\n".join(line for line in lines if line)


def kept_in_float32(name: str) -> bool:
    """True for tensors that round badly in half precision: rotary frequencies, positions, latent statistics."""
    return _like(name, KEPT_IN_FLOAT32)


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    rules: Sequence[Rule] = (),
    dtype: torch.dtype | None = None,
    strict: bool = True,
    subfolder: str | None = None,
    offline: bool = False,
    keep_float32: Callable[[str], bool] = kept_in_float32,
) -> Summary:
    """Fills every tensor of `model` from a file, folder or hub id, and returns what was read.

    `rules` apply before DEFAULT_RULES. Floating tensors become `dtype`, or the model's own dtype when None, save those
    that `keep_float32` names. A model on the meta device gets the tensors themselves (its non-persistent buffers stay
    as they are); any other model has its values overwritten in place. Nothing is changed before everything fits.
    Raises WeightsError naming each tensor that is missing, unexpected or of another shape; with `strict=False` missing
    and unexpected ones are reported in the summary instead, and missing ones keep the model's values.
    """
    path = locate(source, what=f"{type(model).__name__} weights", subfolder=subfolder, offline=offline)
    tensors: TensorDict = read_state_dict(path)
    summary = summarize(path, tensors)
    own = model.state_dict(keep_vars=True)
    dropped: list[str] = []
    resized: list[str] = []
    for rule in (*rules, *DEFAULT_RULES):
        before, tensors = tensors, rule.load(tensors, own)
        if isinstance(rule, Drop):
            dropped += before.keys() - tensors.keys()
        elif isinstance(rule, ResizeRows):
            resized += [name for name in tensors if tensors[name] is not before[name]]
    tensors = _with_tied(tensors, own)
    computed = [rule for rule in (*rules, *DEFAULT_RULES) if isinstance(rule, Drop)]
    missing = [name for name in own if name not in tensors]
    missing = [name for name in missing if own[name].is_meta or not any(rule.matches(name) for rule in computed)]
    unexpected = [name for name in tensors if name not in own]
    problems = [f"{n}: expected {_shape(own[n])}, found {_shape(tensors[n])}" for n in own if _misfit(n, own, tensors)]
    problems += [f"missing {n} {_shape(own[n])}" for n in missing if strict or own[n].is_meta]
    problems += [f"unexpected {n} {_shape(tensors[n])}" for n in unexpected if strict]
    if problems:
        raise WeightsError(f"{path} does not fit {type(model).__name__}: {_first(problems, separator='; ')}")
    _fill(model, own, tensors, {name: _target(name, own[name], dtype, keep_float32) for name in own})
    dropped = sorted(dropped + unexpected)
    return replace(summary, dropped=tuple(dropped), resized=tuple(resized), missing=tuple(missing))


def _fill(model: nn.Module, own: TensorDict, tensors: TensorDict, targets: Mapping[str, torch.dtype]) -> None:
    on_meta = any(tensor.is_meta for tensor in own.values())
    ready: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    for name, mine in own.items():
        if not mine.is_meta:
            mine.data = mine.data.to(targets[name])
        if name not in tensors:
            continue
        value = tensors[name]
        if on_meta:
            value = value.to("cpu" if mine.is_meta else mine.device, targets[name])
            if isinstance(mine, nn.Parameter):
                value = made.setdefault(id(mine), nn.Parameter(value, requires_grad=mine.requires_grad))
        ready[name] = value
    model.load_state_dict(ready, strict=False, assign=on_meta)


def _with_tied(tensors: TensorDict, own: TensorDict) -> dict[str, Tensor]:
    """The tensors, plus names that the model ties to one of them and the file leaves out."""
    holders = {id(own[name]): name for name in own if name in tensors}
    tied = {name: tensors[holders[id(own[name])]] for name in own if name not in tensors and id(own[name]) in holders}
    return {**tensors, **tied}


def _misfit(name: str, own: TensorDict, tensors: TensorDict) -> bool:
    if name not in tensors:
        return False
    mine, found = own[name], tensors[name]
    return mine.shape != found.shape or mine.is_floating_point() != found.is_floating_point()


def _target(name: str, mine: Tensor, dtype: torch.dtype | None, keep_float32: Callable[[str], bool]) -> torch.dtype:
    if not mine.is_floating_point():
        return mine.dtype
    return torch.float32 if keep_float32(name) else dtype or mine.dtype


def save_file(state_dict: TensorDict, path: str | os.PathLike[str]) -> None:
    """Writes tensors to one .safetensors, .pt, .pth or .bin file; the file appears whole or not at all."""
    with _replacing(Path(path)) as temporary:
        _write(dict(state_dict), temporary)


def save_pretrained(
    state_dict: TensorDict, folder: str | os.PathLike[str], config: Mapping[str, Any], max_shard_bytes: int = 5 * 2**30
) -> None:
    """Writes config.json and model.safetensors, or an index and shards of at most `max_shard_bytes` (or one tensor).

    Files appear under their names only once all of them are written. Weights saved there before are replaced.
    """
    folder, stem = Path(folder), STEMS[0]
    shards = _split(state_dict, max_shard_bytes)
    total = len(shards)
    names = [f"{stem}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    names = names if total > 1 else [f"{stem}.safetensors"]
    documents: dict[str, Mapping[str, Any]] = {"config.json": config}
    if total > 1:
        size = sum(tensor.nbytes for tensor in state_dict.values())
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        documents[f"{stem}.safetensors{INDEX}"] = {"metadata": {"total_size": size}, "weight_map": where}
    ours = (f"{stem}.safetensors", f"{stem}.safetensors{INDEX}", f"{stem}-?????-of-?????.safetensors")
    stale = [file for pattern in ours for file in folder.glob(pattern) if file.name not in (*names, *documents)]
    with ExitStack() as files:
        for name, document in documents.items():
            text = json.dumps(dict(document), indent=2) + "\n"
            files.enter_context(_replacing(folder / name)).write_text(text, encoding="utf-8")
        for name, shard in zip(names, shards, strict=True):
            _write(shard, files.enter_context(_replacing(folder / name)))
    for file in stale:
        file.unlink()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the block ends well, and is removed when it does not."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written ({one_line(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    if file.suffix not in SUFFIXES:
        raise WeightsError(f"{file}: cannot write this kind of file; known are {', '.join(SUFFIXES)}")
    tensors = _untied(tensors)
    try:
        if file.suffix == ".safetensors":
            save_safetensors(tensors, file, metadata={"format": "pt"})
        else:
            torch.save(tensors, file)
    except Exception as error:  # the two writers report a full disk in types of their own
        raise OSError(one_line(error)) from error


def _untied(tensors: TensorDict) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory and none drags a larger storage along."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or (plain.nbytes and storage.data_ptr() in seen):
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result


def _split(state_dict: TensorDict, limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in state_dict.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def _like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return f"{_dtype_name(tensor)} [{', '.join(map(str, tensor.shape))}]"


def _first(words: Sequence[str], limit: int = 10, separator: str = ", ") -> str:
    more = f"{separator}and {len(words) - limit:,} more" if len(words) > limit else ""
    return separator.join(words[:limit]) + more
