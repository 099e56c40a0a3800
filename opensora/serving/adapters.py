"""Adapters (LoRA) that a server offers by name: files of its operator, copied into the data folder.

Requests name them, `NAME` or `NAME:STRENGTH`; no request and no recipe has a path of the server.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from opensora.errors import ConfigError, did_you_mean, printable
from opensora.pipeline.adapter_uses import AdapterUse, adapter_uses

FOLDER = Path("adapters")  # below the data folder, which workers run in
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def copy_adapters(entries: Sequence[str], folder: Path) -> list[str]:
    """Copies adapter files, each FILE or NAME=FILE, into the data folder in place of earlier ones; returns their names.

    Raises ConfigError.
    """
    files: dict[str, Path] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        file = Path(path if equals else entry)
        name = name if equals else file.stem
        if not _NAME.fullmatch(name) or name in files:
            raise ConfigError(
                f"--lora {entry}: give it a name of its own of letters, digits, '_' and '-', as NAME=FILE"
            )
        if file.suffix != ".safetensors" or not file.is_file():
            remedy = "give a .safetensors file; `opensora convert --to lora-diffusers` makes one of a folder"
            raise ConfigError(f"--lora {entry}: {file} is no adapter file; {remedy}")
        files[name] = file
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    if files:
        (folder / FOLDER).mkdir(parents=True)
    for name, file in files.items():
        shutil.copyfile(file, folder / _path(name))
    return sorted(files)


def named_adapters(value: Any, known: Collection[str]) -> list[str]:
    """The adapters of a request, each NAME:STRENGTH. Raises ConfigError for a name that the server does not offer."""
    entries = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ConfigError("lora must name adapters, such as style or style:0.8")
    entries = [word for entry in entries for word in entry.replace(",", " ").split()]
    uses = adapter_uses(entries)
    for use in uses:
        if use.path not in known:
            offered = did_you_mean(use.path, known) or f"; there is {', '.join(sorted(known)) or 'none'}"
            raise ConfigError(f"lora: this server has no adapter {printable(use.path)[:80]!r}{offered}")
    return [str(use) for use in uses]


def adapter_files(named: Sequence[str]) -> list[str]:
    """The setting `lora` of a request: the files of its adapters, below the data folder."""
    return [str(AdapterUse(str(_path(use.path)), use.strength)) for use in adapter_uses(named)]


def _path(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"
