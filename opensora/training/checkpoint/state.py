"""Training checkpoints: one folder each, written whole or not at all; restore.py leads back from them.

Layout (as the documents describe it): `epochE-global_stepN/` holds `model/` (config.json + model.safetensors),
`ema.pt`, `optimizer/optimizer.pt`, the hashes of all files in `optimizer/manifest.json`, and `running_states.json`.
Whatever a killed run was writing or removing has a hidden name, and the next save sweeps it away. `latest` points to
the newest one. Files hold whole tensors, whatever the number of ranks, and are written while training goes on.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora.checkpoints.save import save_pretrained
from opensora.distributed.fsdp import Layout
from opensora.distributed.full_state_dict import whole
from opensora.errors import OpenSoraError, WeightsError
from opensora.files import why
from opensora.training.checkpoint import manifest
from opensora.training.data.position import FILE as POSITION
from opensora.training.ema import EMA

logger = logging.getLogger("opensora")
NAME = re.compile(r"epoch(\d+)-global_step(\d+)")
LATEST = "latest"


def experiment_folder(outputs: str, model_type: str) -> Path:
    """A new folder `outputs/NNN-MODEL`, numbered after the highest number that is there; the number is its own.

    Raises WeightsError where it cannot be made.
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
        raise WeightsError(f"{outputs}: no folder of a run can be made there ({why(error)}); see --outputs") from error


def experiments(outputs: Path) -> list[Path]:
    """The folders of runs below `outputs`, the newest number last."""
    found = [path for path in outputs.iterdir() if _number(path) >= 0 and path.is_dir()] if outputs.is_dir() else []
    return sorted(found, key=lambda path: (_number(path), path.name))


def _number(path: Path) -> int:
    match = re.match(r"(\d{3,18})-", path.name)
    return int(match[1]) if match else -1


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of an experiment folder, oldest first."""
    try:
        found = [(int(match[2]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    except OSError as error:
        raise WeightsError(f"{folder}: cannot be read ({why(error)})") from error
    return [path for _, path in sorted(found)]


def checkpoint_folder(folder: Path, position: dict[str, Any]) -> Path:
    """Where the checkpoint of a position lies."""
    return folder / f"epoch{position['epoch']}-global_step{position['global_step']}"


def candidates(source: str | os.PathLike[str]) -> list[Path]:
    """The checkpoint folders that `source` names, the newest first: itself alone, or those of an experiment folder."""
    folder = Path(source)
    if not folder.is_dir():
        raise WeightsError(f"no training checkpoint at '{source}': give an experiment folder or one of its checkpoints")
    found = [folder] if (folder / POSITION).is_file() or NAME.fullmatch(folder.name) else checkpoints(folder)[::-1]
    if not found:
        raise WeightsError(f"'{source}' holds no finished checkpoint (epochE-global_stepN with running_states.json)")
    return found


def find_checkpoint(source: str | os.PathLike[str]) -> Path:
    """The newest checkpoint folder that `source` names, with the right hashes or none. Raises WeightsError."""
    newest = candidates(source)[0]
    manifest.verify(newest)
    return newest


class Snapshot(NamedTuple):
    """All of a checkpoint, in memory of its own: training may go on."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    rest: dict[str, Any]  # of the optimizer and the scaler


def snapshot(model: nn.Module, ema: EMA, optimizer: Any, scaler: Any, layout: Layout) -> Snapshot | None:
    """What the main rank has to write, nothing of it sharded; None on the others. All ranks call this together."""
    rest = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    parts = [whole(part, layout) for part in (model.state_dict(), ema.state_dict(), rest)]
    return Snapshot(*parts) if layout.is_main else None


def save(
    folder: Path, model: nn.Module, config: dict, ema: EMA, optimizer: Any, scaler: Any, position: dict, keep: int
) -> Path:
    """Writes one checkpoint of a single rank as `write` does, and returns its folder."""
    return write(folder, snapshot(model, ema, optimizer, scaler, Layout()), config, position, keep)


def write(folder: Path, taken: Snapshot, config: dict, where: dict, keep: int, run: str | None = None) -> Path:
    """Writes one checkpoint of the position `where` = {epoch, step, global_step, ...}.

    `config` goes into the model's config.json. Of the checkpoints that `run` has written all but the newest `keep` are
    removed. Raises WeightsError when the disk refuses, leaving the others alone.
    """
    for leftover in folder.glob(".epoch*"):
        _remove(leftover)
    final = checkpoint_folder(folder, where)
    unfinished = folder / f".{final.name}.tmp"
    try:
        _require_room(folder, taken)
        (unfinished / "optimizer").mkdir(parents=True)
        save_pretrained(taken.model, unfinished / "model", config)
        _save(taken.ema, unfinished / "ema.pt")
        _save(taken.rest, unfinished / "optimizer" / "optimizer.pt")
        (unfinished / POSITION).write_text(json.dumps(where, indent=1))
        manifest.write(unfinished, run)
        _sync(unfinished)
        _make_way(final, run)
        unfinished.rename(final)
        point(folder / LATEST, final.name)
        _sync_folder(folder)
    except (OSError, RuntimeError, OpenSoraError) as error:
        raise WeightsError(f"{final}: cannot be written: {_refusal(error, folder, taken)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    own = [path for path in checkpoints(folder) if run is not None and manifest.run_of(path) == run]
    for old in own[:-keep]:
        _discard(old)
    return final


def _save(value: Any, path: Path) -> None:
    """Like torch.save, which hides what the operating system says."""
    with path.open("wb") as file:
        torch.save(value, file)


def _require_room(folder: Path, taken: Snapshot) -> None:
    if (free := _free(folder)) is not None and free < _size(taken):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _free(folder: Path) -> int | None:
    """The bytes that are free; None where the file system does not know."""
    try:
        disk = shutil.disk_usage(folder)
    except OSError:
        return None
    return disk.free if disk.total else None


def _size(taken: Snapshot) -> int:
    """The bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(taken))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from _tensors(item)


def _refusal(error: BaseException, folder: Path, taken: Snapshot) -> str:
    """What kept a checkpoint from being written; torch and safetensors tell of a full disk in words of their own."""
    numbers, one = set(), error
    while one is not None:
        numbers |= {getattr(one, "errno", None), *map(int, re.findall(r"os error (\d+)", str(one)))}
        one = one.__cause__ or one.__context__
    free, needed = _free(folder), _size(taken)
    hidden = "unexpected pos" in str(error) and free is not None and free < needed
    if numbers & {errno.ENOSPC, errno.EDQUOT} or hidden:
        room = f"{(free or 0) / 1e9:.3g} GB are free, {needed / 1e9:.3g} GB and more are needed"
        return f"the disk is full ({room}); make room, then go on with --load {folder}"
    if errno.EFBIG in numbers:
        return f"files may not become that large here (ulimit -f); raise that, then go on with --load {folder}"
    return f"{why(error)}; go on with --load {folder}"


def _make_way(final: Path, run: str | None) -> None:
    """Removes a checkpoint of the same name, if this run wrote it."""
    if final.exists() and manifest.run_of(final) != run:
        raise WeightsError("there is a checkpoint of another run with that name; move it away")
    if final.exists():
        _remove(final.rename(final.with_name(f".{final.name}.old")))


class Writer:
    """Writes checkpoints in the background, one after another; what went wrong is raised by the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, *args: Any) -> None:
        """Begins `write(*args)` once the last one is done."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=args, name="checkpoint")
        self._thread.start()

    def _run(self, *args: Any) -> None:
        try:
            write(*args)
        except BaseException as error:  # for whoever waits
            self._error = error

    def wait(self) -> None:
        """Returns when everything is written, or raises what kept it from being so."""
        if self._thread is not None:
            self._thread.join()
        error, self._error, self._thread = self._error, None, None
        if error is not None:
            raise error


def replace_text(path: Path, text: str) -> None:
    """Writes a text file that appears whole or stays as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _discard(folder: Path) -> None:
    """Removes a checkpoint; half-removed it no longer has a checkpoint's name. What cannot be removed is told."""
    try:
        folder = folder.rename(folder.with_name(f".{folder.name}.old"))
    except OSError as error:
        logger.warning("%s: cannot be removed (%s); training goes on", folder, why(error))
    else:
        _remove(folder)


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s: cannot be removed (%s); training goes on", path, why(error))


def point(link: Path, name: str) -> None:
    """Makes `link` lead to `name`, which is relative to it, from one moment to the next; where there are links."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    with suppress(OSError, NotImplementedError):  # file systems without links do without it
        temporary.symlink_to(name)
        temporary.replace(link)


def _sync(folder: Path) -> None:
    """Makes sure that the files are on disk before the folder gets its final name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """The same for the names in a folder, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
