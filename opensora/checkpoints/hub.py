"""Locates checkpoint files: a local path, the hub cache, or a download, in this order."""

from __future__ import annotations

import os
import re
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from opensora import files
from opensora.checkpoints.file_kinds import wrong_text
from opensora.checkpoints.published_files import HUB, PUBLISHED, published
from opensora.errors import WeightsError, did_you_mean

WRITABLE = (".safetensors", ".bin", ".pt", ".pth")
SUFFIXES = (*WRITABLE, ".gguf")
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2")
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
INDEX = ".index.json"
EMBEDDED = "embedded:"  # prefix of a part of the model shipped with the package

_SMALL = ("*.json", "*.txt", "*.model")
_ROUNDS = ((*_SMALL, "*.safetensors"), (*_SMALL, "*.bin", "*.pt", "*.pth"))
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TIMEOUT = 5.0
_ALTERNATIVES = "give a local path, fill the hub cache beforehand (HF_HOME), or use --model embedded"


def locate(
    source: str | os.PathLike[str], *, what: str = "weights", subfolder: str | None = None, offline: bool = False,
    cache_dir: str | None = None, local_files_only: bool = False,
) -> Path:  # fmt: skip
    """The local file or folder of `source`.

    `source` is a file, a folder, "embedded:PART", a hub id ("org/name") or the bare name of a published file. The last
    two come from the local cache (`cache_dir`, HF_HOME, HF_HUB_CACHE), or are downloaded unless `offline`,
    `local_files_only` or HF_HUB_OFFLINE forbids it. `subfolder` selects a part of a repository; a local folder without
    that subfolder is taken as the part itself. Raises WeightsError, which calls the weights `what`, within seconds even
    if the hub is unreachable.
    """
    text = os.fspath(source)
    if not text:
        raise WeightsError(f"{what}: no path and no hub id given")
    if text.startswith(EMBEDDED):
        text = os.path.join(os.path.dirname(os.path.dirname(__file__)), "embedded", text.removeprefix(EMBEDDED))
    path = Path(text).expanduser()
    if _exists(path):
        part = path / (subfolder or "")
        return part if part.is_dir() else path
    remote = _Remote.of(text, subfolder)
    if remote is None:
        raise WeightsError(_no_such(text, what))
    forbidden = "offline" if offline or _hub_is_offline() else "local_files_only" if local_files_only else ""
    return _from_hub(remote, what, cache_dir and os.path.expanduser(cache_dir), forbidden)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


class _Remote(NamedTuple):
    """A request to the hub: the weights under `prefix` in a repository, or one file."""

    repository: str
    prefix: str = ""
    file: str = ""
    address: str | None = None  # URL for a manual download

    @classmethod
    def of(cls, text: str, subfolder: str | None) -> _Remote | None:
        """The request for a hub id or a published file name; None for other names."""
        known = published(text)
        if known and known.repository:
            return cls(known.repository, file=known.file, address=known.address)
        if _HUB_ID.fullmatch(text) and not text.endswith(SUFFIXES):
            return cls(text, f"{subfolder}/" if subfolder else "")
        return None

    def __str__(self) -> str:
        return f"'{self.file}' of '{self.repository}'" if self.file else f"'{self.repository}'"

    @property
    def alternatives(self) -> str:
        """Remedies for the error message."""
        by_hand = f"download it from {self.address} and name it with --ckpt-path, or " if self.file else ""
        return f"{by_hand}{_ALTERNATIVES}"

    def cached(self, cache_dir: str | None) -> Path | None:
        """The complete files in the local cache, or None. Does not access the network."""
        if not self.file:
            return _snapshot(self.repository, self.prefix, cache_dir, cached=True)
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repository, self.file, cache_dir=cache_dir)
        return Path(found) if isinstance(found, str) else None

    def download(self, cache_dir: str | None) -> Path | None:
        """Downloads the files; None if the repository has no such weights."""
        if not self.file:
            return _snapshot(self.repository, self.prefix, cache_dir, cached=False)
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.repository, self.file, cache_dir=cache_dir, etag_timeout=_TIMEOUT))


def _no_such(text: str, what: str) -> str:
    """The error message for a name that is neither local nor on the hub."""
    if os.path.lexists(Path(text).expanduser()):
        return f"{what}: '{text}' is a link to something that is missing; copy or download it again"
    known, name = published(text), os.path.basename(text)
    if known and known.url:
        return f"{what}: no file '{text}' here; it is published at {known.url}: download it, and give its path"
    if known:
        return f"{what}: no file '{text}' here, and its authors have not published it; name other weights (--ckpt-path)"
    problem = f"{what}: no such file or folder '{text}'"
    if name != text and (other := published(name)) and other.repository:
        return f"{problem}; to fetch the published file, give the bare name '{name}'"
    near = did_you_mean(text, PUBLISHED) if name == text and text.endswith(SUFFIXES) else ""
    return f"{problem}{near or '; name one that is here, or a hub id (org/name)'}"


def _hub_is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _from_hub(remote: _Remote, what: str, cache_dir: str | None, forbidden: str) -> Path:
    if found := remote.cached(cache_dir):
        return found
    absent = f"{what}: {remote} is not a local path and not in the hub cache{(cache_dir and f' {cache_dir}') or ''}"
    if forbidden:
        raise WeightsError(f"{absent} ({forbidden}); {remote.alternatives}")
    if reason := _unreachable(remote.repository):
        raise WeightsError(f"{absent}, and the hub {reason}; {remote.alternatives}")
    try:
        found = remote.download(cache_dir)
    except Exception as error:  # the client raises anything
        reason = _refusal(error, remote.repository) or one_line(error)
        raise WeightsError(f"{what}: download of {remote} failed ({reason}); {remote.alternatives}") from error
    if found is None:
        under = f" under {remote.prefix}" if remote.prefix else ""
        raise WeightsError(f"{what}: hub repository '{remote.repository}' holds none{under}")
    return found


def _snapshot(repo: str, prefix: str, cache_dir: str | None, cached: bool) -> Path | None:
    """The folder `prefix` of a complete snapshot; accesses the network only with `cached=False`."""
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"etag_timeout": _TIMEOUT, "local_files_only": cached, "cache_dir": cache_dir}
    not_there = (WeightsError, OSError) if cached else (WeightsError,)
    for patterns in _ROUNDS:
        with suppress(*not_there):
            allowed = [prefix + pattern for pattern in patterns]
            folder = snapshot_download(repo, allow_patterns=allowed, ignore_patterns=[f"{prefix}*/*"], **options)
            checkpoint_files(Path(folder, prefix))
            return Path(folder, prefix)
    return None


def _unreachable(repo: str) -> str | None:
    """Why the hub does not answer for `repo`, or None if it does. One request, at most 10 s.

    The thread bounds what the client's timeout does not cover, such as a hanging DNS lookup.
    """
    from huggingface_hub import HfApi

    reasons: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().repo_info(repo, timeout=_TIMEOUT)
            reasons.append(None)
        except Exception as error:
            reasons.append(_refusal(error, repo) or f"cannot be reached ({one_line(error)})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * _TIMEOUT)
    return reasons[0] if reasons else "cannot be reached (no answer)"


def _refusal(error: BaseException, repo: str) -> str | None:
    """The meaning of an HTTP status; None if the error has none."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    match status:
        case None:
            return None
        case 401:
            return "answers 401 for it: it is private, gated or does not exist (log in with `hf auth login`)"
        case 403:
            return f"answers 403 for it: agree to its terms at {HUB}/{repo}, then log in with `hf auth login`"
        case 404:
            return "answers 404 for it: there is no such repository or file; check the name"
        case 429:
            return "answers 429 for it: too many requests; wait, or log in with `hf auth login`"
    return f"answers {status} for it"


def checkpoint_files(path: Path) -> dict[Path, list[str]]:
    """The weight files of a checkpoint, each with the tensor names that the index lists for it (none without an index).

    `path` is a weight file, an index or a folder. A folder is searched for an index or file with a standard name, then
    for `model/` (a training checkpoint), then for a single file with any name. Raises WeightsError if there is none or
    more than one, or if an index lists a file that is missing or outside of the folder.
    """
    if path.is_file():
        return _shards(path) if path.name.endswith(INDEX) else {path: []}
    if not path.is_dir():
        raise WeightsError(f"{path}: {'is neither a file nor a folder' if path.exists() else 'no such file or folder'}")
    for suffix in SUFFIXES:
        usual = [path / f"{stem}{suffix}{index}" for index in (INDEX, "") for stem in STEMS]
        if there := [file for file in usual if file.exists()]:
            return checkpoint_files(_the_only(there, path))
    if (path / "model").exists():
        return checkpoint_files(path / "model")
    found = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
    loose = [file for file in found if file.name.endswith(INDEX)] or [file for file in found if file.suffix in SUFFIXES]
    if not loose:
        if started := [file.name for file in found if file.suffix in UNFINISHED]:
            raise WeightsError(f"{path}: holds an unfinished download alone ({started[0]}); download it again")
        raise WeightsError(f"{path}: no weights in this folder (looked for *{', *'.join(SUFFIXES)})")
    return checkpoint_files(_the_only(loose, path))


def _the_only(files: list[Path], folder: Path) -> Path:
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise WeightsError(f"{folder}: several checkpoints in this folder ({names}); name one of them")
    return files[0]


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
    """The config.json of a checkpoint folder, or beside a weight file with a standard name; empty if there is none."""
    usual = path.is_dir() or path.name.split(".")[0] in STEMS
    config = (path if path.is_dir() else path.parent) / "config.json"
    return read_json(config) if usual and config.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises WeightsError for anything else."""
    content = files.read_bytes(path, files.MAX_JSON_BYTES, WeightsError)
    if kind := wrong_text(path):
        raise WeightsError(f"{path}: {kind}")
    found = files.parse_json(content, str(path), WeightsError)
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: holds a JSON {type(found).__name__}, not an object")
    return found


def one_line(error: BaseException) -> str:
    """An exception as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:150]}" if text else type(error).__name__
