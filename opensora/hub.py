"""Finds checkpoint files: a local file or folder, the local hub cache, or a download, in this order."""

from __future__ import annotations

import json
import os
import re
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from opensora.errors import WeightsError

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
INDEX = ".index.json"
EMBEDDED = "embedded:"  # a part of the model that ships with the package

_SMALL = ("*.json", "*.txt", "*.model")
_ROUNDS = ((*_SMALL, "*.safetensors"), (*_SMALL, "*.bin", "*.pt", "*.pth"))
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TIMEOUT = 5.0
_WAYS_OUT = "give a local path, fill the hub cache beforehand (HF_HOME), or use --model embedded"


def locate(
    source: str | os.PathLike[str], *, what: str = "weights", subfolder: str | None = None, offline: bool = False
) -> Path:
    """The local file or folder that `source` stands for.

    `source` is a file, a folder, "embedded:PART" or a hub id ("org/name"); an id is looked up in the local cache
    (HF_HOME, HF_HUB_CACHE) and downloaded only when it is not there and neither `offline` nor HF_HUB_OFFLINE forbids.
    `subfolder` picks a part of a repository; a local folder without it is taken to be that part itself.
    Raises WeightsError, which calls the thing `what`, within seconds even when the hub cannot be reached.
    """
    text = os.fspath(source)
    if not text:
        raise WeightsError(f"{what}: no path and no hub id given")
    if text.startswith(EMBEDDED):
        text = os.path.join(os.path.dirname(__file__), "embedded", text.removeprefix(EMBEDDED))
    path = Path(text).expanduser()
    if path.exists():
        part = path / (subfolder or "")
        return part if part.is_dir() else path
    if not _HUB_ID.fullmatch(text) or text.endswith(SUFFIXES):
        raise WeightsError(f"{what}: no such file or folder '{text}'; name one that is here, or a hub id (org/name)")
    return _from_hub(text, what, f"{subfolder}/" if subfolder else "", offline)


def _from_hub(repo: str, what: str, prefix: str, offline: bool) -> Path:
    from huggingface_hub import constants

    if folder := _snapshot(repo, prefix, cached=True):
        return folder
    absent = f"{what}: '{repo}' is no local path and not in the hub cache"
    if offline or constants.HF_HUB_OFFLINE:
        raise WeightsError(f"{absent} (offline); {_WAYS_OUT}")
    if reason := _unreachable(repo):
        raise WeightsError(f"{absent}, and the hub {reason}; {_WAYS_OUT}")
    try:
        folder = _snapshot(repo, prefix, cached=False)
    except Exception as error:
        raise WeightsError(f"{what}: download of '{repo}' failed ({one_line(error)}); {_WAYS_OUT}") from error
    if folder is None:
        raise WeightsError(f"{what}: hub repository '{repo}' holds none{prefix and f' under {prefix}'}")
    return folder


def _snapshot(repo: str, prefix: str, cached: bool) -> Path | None:
    """The folder `prefix` of a repository in the cache once it is complete; only `cached=False` uses the network."""
    from huggingface_hub import snapshot_download

    options = {"etag_timeout": _TIMEOUT, "local_files_only": cached, "ignore_patterns": [f"{prefix}*/*"]}
    not_there = (WeightsError, OSError) if cached else (WeightsError,)
    for patterns in _ROUNDS:
        with suppress(*not_there):
            folder = snapshot_download(repo, allow_patterns=[prefix + pattern for pattern in patterns], **options)
            checkpoint_files(Path(folder, prefix))
            return Path(folder, prefix)
    return None


def _unreachable(repo: str) -> str | None:
    """Why the hub does not answer for `repo`, or None when it does. Asks once, and waits no longer than twice 5 s.

    The thread bounds what no timeout of the client covers: a name look-up that hangs.
    """
    from huggingface_hub import HfApi

    reasons: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().repo_info(repo, timeout=_TIMEOUT)
            reasons.append(None)
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            reasons.append(f"answers {status} for it" if status else f"cannot be reached ({one_line(error)})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * _TIMEOUT)
    return reasons[0] if reasons else "cannot be reached (no answer)"


def checkpoint_files(path: Path) -> dict[Path, list[str]]:
    """The weight files of a checkpoint, each with the tensor names its index promises (none without an index).

    `path` is a weight file, an index or a folder. A folder is searched for an index or file of a usual name, then for
    `model/` (a training checkpoint), then for a single file of any name. Raises WeightsError when there is none, when
    several could be meant, and when an index names a file that is missing or lies elsewhere.
    """
    if path.is_file():
        return _shards(path) if path.name.endswith(INDEX) else {path: []}
    if not path.is_dir():
        raise WeightsError(f"{path}: no such file or folder")
    usual = [path / f"{stem}{suffix}{index}" for suffix in SUFFIXES for index in (INDEX, "") for stem in STEMS]
    for candidate in (*usual, path / "model"):
        if candidate.exists():
            return checkpoint_files(candidate)
    files = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
    loose = [file for file in files if file.name.endswith(INDEX)] or [file for file in files if file.suffix in SUFFIXES]
    if not loose:
        raise WeightsError(f"{path}: no weights in this folder (looked for *{', *'.join(SUFFIXES)})")
    if len(loose) > 1:
        names = ", ".join(file.name for file in loose[:5])
        raise WeightsError(f"{path}: several checkpoints in this folder ({names}); name one of them")
    return checkpoint_files(loose[0])


def _shards(index: Path) -> dict[Path, list[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: not a checkpoint index (no 'weight_map' of tensor names to file names)")
    shards: dict[Path, list[str]] = {}
    for tensor, name in sorted(weight_map.items()):
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\]", name):
            raise WeightsError(f"{index}: shard {name!r} is not a file beside the index; refused")
        shards.setdefault(index.parent / name, []).append(tensor)
    for file in shards:
        if not file.is_file():
            raise WeightsError(f"{index}: names shard '{file.name}', which is missing; copy or download it again")
    return shards


def read_config_json(path: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder, or beside a weight file of a usual name; empty when there is none."""
    usual = path.is_dir() or path.name.split(".")[0] in STEMS
    config = (path if path.is_dir() else path.parent) / "config.json"
    return read_json(config) if usual and config.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file; anything else raises WeightsError naming it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({one_line(error)})") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: holds a JSON {type(found).__name__}, not an object")
    return found


def one_line(error: BaseException) -> str:
    """An exception in a few words."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:150]}" if text else type(error).__name__
