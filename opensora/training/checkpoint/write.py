"""Writes a training checkpoint, completely or not at all.

`epochE-global_stepN/` holds `model/` (config.json and model.safetensors, or the file of an adapter), `ema.pt`,
`optimizer/optimizer.pt`, `optimizer/manifest.json` (the hashes of all files) and `running_states.json`. Files hold full
tensors whatever the number of ranks. Unfinished and discarded checkpoints have hidden names; the next save removes what
a killed run left.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from opensora.checkpoints.lora import FILE as ADAPTER
from opensora.checkpoints.lora import write_lora
from opensora.checkpoints.save import save_pretrained
from opensora.errors import OpenSoraError, WeightsError
from opensora.files import error_message
from opensora.training.checkpoint import manifest
from opensora.training.checkpoint.folders import LATEST, checkpoint_folder, checkpoints, point_link
from opensora.training.checkpoint.running_states import FILE as RUNNING_STATES
from opensora.training.checkpoint.snapshot import Snapshot

logger = logging.getLogger("opensora")


def write_checkpoint(
    folder: Path, state: Snapshot, config: dict[str, Any], running_states: dict[str, Any], keep: int,
    run: str | None = None,
) -> Path:  # fmt: skip
    """Writes a checkpoint into the run folder `folder` and returns its folder.

    `config` goes into the model's config.json, `running_states` = {epoch, step, global_step, ...} into the file of that
    name. Of the checkpoints that `run` wrote, only the newest `keep` stay. Raises WeightsError when writing fails; the
    other checkpoints are then untouched.
    """
    for leftover in folder.glob(".epoch*"):
        _remove(leftover)
    final = checkpoint_folder(folder, running_states)
    unfinished = folder / f".{final.name}.tmp"
    try:
        _require_space(folder, state)
        (unfinished / "optimizer").mkdir(parents=True)
        if state.adapter is None:
            save_pretrained(state.model, unfinished / "model", config)
        else:
            write_lora(unfinished / "model" / ADAPTER, state.adapter)
        _torch_save(state.ema, unfinished / "ema.pt")
        _torch_save(state.optimizer, unfinished / "optimizer" / "optimizer.pt")
        (unfinished / RUNNING_STATES).write_text(json.dumps(running_states, indent=1))
        manifest.write(unfinished, run)
        _sync(unfinished)
        _remove_previous(final, run)
        unfinished.rename(final)
        point_link(folder / LATEST, final.name)
        _sync_folder(folder)
    except (OSError, RuntimeError, OpenSoraError) as error:
        raise WeightsError(f"{final}: cannot be written: {_reason(error, folder, state)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    own = [path for path in checkpoints(folder) if run is not None and manifest.run_of(path) == run]
    for old in own[:-keep]:
        _discard(old)
    return final


class BackgroundWriter:
    """Writes checkpoints in a thread, one at a time; the next call raises what went wrong."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, *args: Any) -> None:
        """Starts `write_checkpoint(*args)` once the previous one is written."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=args, name="checkpoint")
        self._thread.start()

    def _run(self, *args: Any) -> None:
        try:
            write_checkpoint(*args)
        except BaseException as error:  # raised by `wait`
            self._error = error

    def wait(self) -> None:
        """Returns when everything is written. Raises what kept it from being written."""
        if self._thread is not None:
            self._thread.join()
        error, self._error, self._thread = self._error, None, None
        if error is not None:
            raise error


def _torch_save(value: Any, path: Path) -> None:
    """torch.save through a file object: given a path, it hides the operating system's error."""
    with path.open("wb") as file:
        torch.save(value, file)


def _require_space(folder: Path, state: Snapshot) -> None:
    if (free := _free_bytes(folder)) is not None and free < state.num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _free_bytes(folder: Path) -> int | None:
    """Free disk space; None where the file system does not report it."""
    try:
        disk = shutil.disk_usage(folder)
    except OSError:
        return None
    return disk.free if disk.total else None


def _reason(error: BaseException, folder: Path, state: Snapshot) -> str:
    """Why a checkpoint could not be written; torch and safetensors report a full disk in words of their own."""
    codes: set[int | None] = set()
    cause: BaseException | None = error
    while cause is not None:
        codes |= {getattr(cause, "errno", None), *map(int, re.findall(r"os error (\d+)", str(cause)))}
        cause = cause.__cause__ or cause.__context__
    free, needed = _free_bytes(folder), state.num_bytes
    full_in_torch = "unexpected pos" in str(error) and free is not None and free < needed
    if codes & {errno.ENOSPC, errno.EDQUOT} or full_in_torch:
        space = f"{(free or 0) / 1e9:.3g} GB are free, {needed / 1e9:.3g} GB and more are needed"
        return f"the disk is full ({space}); make room, then resume with --load {folder}"
    if errno.EFBIG in codes:
        return f"files may not become that large here (ulimit -f); raise that, then resume with --load {folder}"
    return f"{error_message(error)}; resume with --load {folder}"


def _remove_previous(final: Path, run: str | None) -> None:
    """Removes a checkpoint of the same name. Raises WeightsError if another run wrote it."""
    if final.exists() and manifest.run_of(final) != run:
        raise WeightsError("there is a checkpoint of another run with that name; move it")
    if final.exists():
        _remove(final.rename(final.with_name(f".{final.name}.old")))


def _discard(folder: Path) -> None:
    """Removes a checkpoint, renamed first so that a half-removed one is not taken for a checkpoint."""
    try:
        folder = folder.rename(folder.with_name(f".{folder.name}.old"))
    except OSError as error:
        logger.warning("%s: cannot be removed (%s); training continues", folder, error_message(error))
    else:
        _remove(folder)


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s: cannot be removed (%s); training continues", path, error_message(error))


def _sync(folder: Path) -> None:
    """Flushes the files of a folder to disk, before the folder gets its final name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, where the system supports it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
