"""Summary of a checkpoint: number of tensors and parameters, dtypes, content hash, and changes made while loading."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch

from opensora.acceleration.packed_tensor import PackedTensor
from opensora.checkpoints.formatting import dtype_name, join_first
from opensora.checkpoints.key_mapping import POSITIONS, TensorDict
from opensora.checkpoints.tensor_threads import map_tensors

NOT_PARAMETERS = ("y_embedder.y_embedding", *POSITIONS, "shift", "scale")
SHORT_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


class Summary(NamedTuple):
    """What a checkpoint holds before key mapping and casts, and what loading changed; `str` gives one line."""

    path: Path
    tensors: int
    parameters: int  # without known buffers
    dtypes: tuple[str, ...]
    sha256: str  # content_hash
    dropped: tuple[str, ...] = ()  # names not loaded
    resized: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()  # (in the file, in the model)
    initial: tuple[str, ...] = ()  # model tensors left at their initial values (strict=False)
    ignored: tuple[str, ...] = ()  # file tensors that the model lacks (strict=False)
    stripped: tuple[str, ...] = ()  # wrapper prefixes removed from all names

    def __str__(self) -> str:
        line = f"{self.path}: {self.tensors:,} tensors, {self.parameters:,} parameters, {'/'.join(self.dtypes)}"
        renamed = [" to ".join(pair) for pair in self.renamed]
        changes = {"stripped": self.stripped, "dropped": self.dropped, "resized": self.resized, "renamed": renamed}
        changes |= {"ignored": self.ignored, "left at initial values": self.initial}
        notes = [f", {what} {join_first(names, 3)}" for what, names in changes.items() if names]
        return f"{line}, sha256 {self.sha256[:12]}{''.join(notes)}"


def summarize(path: Path, tensors: TensorDict, sha256: str | None = None) -> Summary:
    """Summarizes tensors read from `path`; `sha256` is their content hash, if it is known."""
    dtypes = {SHORT_DTYPES.get(name, name) for name in map(dtype_name, tensors.values())}
    return Summary(
        path, len(tensors), count_parameters(tensors), tuple(sorted(dtypes)), sha256 or content_hash(tensors)
    )


def count_parameters(tensors: TensorDict) -> int:
    """Number of parameters: elements of all tensors except known buffers, which a file does not mark."""
    return sum(tensor.numel() for name, tensor in tensors.items() if not matches(name, NOT_PARAMETERS))


def content_hash(tensors: TensorDict) -> str:
    """SHA-256 over each tensor's name, dtype, shape and bytes, sorted by name; independent of the file format."""

    def entry(name: str) -> bytes:
        tensor = tensors[name]
        head, digest = f"{name}\0{dtype_name(tensor)}\0{','.join(map(str, tensor.shape))}\0", hashlib.sha256()
        for part in tensor.parts() if isinstance(tensor, PackedTensor) else [tensor]:
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return head.encode(errors="surrogatepass") + digest.digest()

    entries = map_tensors(entry, tensors)
    return hashlib.sha256(b"".join(entries[name] for name in sorted(tensors))).hexdigest()


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
