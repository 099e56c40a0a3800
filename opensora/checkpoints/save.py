"""Writes checkpoints atomically: one file, or a folder with config.json and shards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file as save_safetensors

from opensora.checkpoints.hub import INDEX, WRITABLE
from opensora.checkpoints.key_mapping import TensorDict
from opensora.errors import WeightsError
from opensora.files import atomic_write

_atomic_write = partial(atomic_write, make_folders=True, error=WeightsError, failures=(RuntimeError, SafetensorError))


def save_file(state_dict: TensorDict, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors atomically to one .safetensors, .pt, .pth or .bin file.

    `metadata` is stored in .safetensors files only.
    """
    path = Path(path)
    if path.suffix not in WRITABLE:
        raise WeightsError(f"{path}: cannot write this kind of file; known are {', '.join(WRITABLE)}")
    with _atomic_write(path) as [temporary]:
        _write(state_dict, temporary, metadata)


def save_pretrained(
    state_dict: TensorDict, folder: str | os.PathLike[str], config: Mapping[str, Any], max_shard_bytes: int = 5 * 2**30
) -> None:
    """Writes config.json and model.safetensors, or an index and shards of at most `max_shard_bytes` (or one tensor).

    All files appear at once, after all of them are written. Existing weights in the folder are replaced.
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
            files.enter_context(_atomic_write(folder / name))[0].write_text(text, encoding="utf-8")
        for name, names in plan.filename_to_tensors.items():
            [temporary] = files.enter_context(_atomic_write(folder / name))
            _write({tensor: state_dict[tensor] for tensor in names}, temporary)
    for file in folder.glob("model*.safetensors*"):
        ours = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", file.name)
        if ours and file.name not in documents and file.name not in plan.filename_to_tensors:
            file.unlink()


def _write(tensors: TensorDict, file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes contiguous copies: tied tensors and views of larger storages become plain tensors."""
    options: dict[str, Any] = {"copy": True, "memory_format": torch.contiguous_format}
    copies = {name: tensor.detach().to("cpu", **options) for name, tensor in tensors.items()}
    if file.suffix == ".safetensors":
        save_safetensors(copies, file, metadata={"format": "pt", **(metadata or {})})
    else:
        torch.save(copies, file)
