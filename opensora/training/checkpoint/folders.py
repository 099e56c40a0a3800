"""The paths of runs and their checkpoints: `outputs/NNN-MODEL/epochE-global_stepN`."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from opensora.errors import WeightsError
from opensora.files import error_message
from opensora.training.checkpoint import manifest
from opensora.training.checkpoint.running_states import FILE as RUNNING_STATES

NAME = re.compile(r"epoch(\d+)-global_step(\d+)")
LATEST = "latest"  # a link to the newest checkpoint


def new_run_folder(outputs: str, model_type: str) -> Path:
    """Creates `outputs/NNN-MODEL` with the next free number, unique also among concurrent runs.

    Raises WeightsError when the folder cannot be created.
    """
    root, name = Path(outputs), model_type.replace("/", "-")
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            folder = root / f"{max(map(_number, root.iterdir()), default=-1) + 1:03d}-{name}"
            with suppress(FileExistsError):  # another run was faster
                folder.mkdir()
                if sum(_number(other) == _number(folder) for other in root.iterdir()) == 1:
                    return folder
                folder.rmdir()
    except OSError as error:
        raise WeightsError(f"{outputs}: cannot create a run folder ({error_message(error)}); see --outputs") from error


def run_folders(outputs: Path) -> list[Path]:
    """The run folders below `outputs`, the highest number last."""
    found = [path for path in outputs.iterdir() if _number(path) >= 0 and path.is_dir()] if outputs.is_dir() else []
    return sorted(found, key=lambda path: (_number(path), path.name))


def _number(path: Path) -> int:
    match = re.match(r"(\d{3,18})-", path.name)
    return int(match[1]) if match else -1


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run folder, oldest first. Raises WeightsError."""
    try:
        found = [(int(match[2]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    except OSError as error:
        raise WeightsError(f"{folder}: cannot be read ({error_message(error)})") from error
    return [path for _, path in sorted(found)]


def checkpoint_folder(folder: Path, running_states: dict[str, Any]) -> Path:
    """The checkpoint of an epoch and step in a run folder."""
    return folder / f"epoch{running_states['epoch']}-global_step{running_states['global_step']}"


def candidates(source: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints that `source` names, newest first: itself, or those of a run folder. Raises WeightsError."""
    folder = Path(source)
    if not folder.is_dir():
        raise WeightsError(f"no training checkpoint at '{source}': give an experiment folder or one of its checkpoints")
    is_checkpoint = (folder / RUNNING_STATES).is_file() or NAME.fullmatch(folder.name)
    found = [folder] if is_checkpoint else checkpoints(folder)[::-1]
    if not found:
        raise WeightsError(f"'{source}' holds no finished checkpoint (epochE-global_stepN with running_states.json)")
    return found


def find_checkpoint(source: str | os.PathLike[str]) -> Path:
    """The newest checkpoint that `source` names, its hashes verified. Raises WeightsError."""
    newest = candidates(source)[0]
    manifest.verify(newest)
    return newest


def point_link(link: Path, target: str) -> None:
    """Atomically points the symbolic link `link` at `target`, a relative path; does nothing without symbolic links."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    with suppress(OSError, NotImplementedError):
        temporary.symlink_to(target)
        temporary.replace(link)
