"""The folder of a run: where it resumes, and which checkpoints are its own."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from opensora.config.schema import Positive, Schema, Text, check
from opensora.config.settings import TrainSettings
from opensora.distributed import ranks
from opensora.errors import ConfigError, MediaError, OpenSoraError, WeightsError
from opensora.files import atomic_write, read_json
from opensora.training import lock
from opensora.training.checkpoint import folders, manifest
from opensora.training.checkpoint.fingerprint import require_accepted
from opensora.training.checkpoint.manifest import RunId
from opensora.training.tracking import copy_log

logger = logging.getLogger("opensora")
FILE = "run.json"
AUTO = "auto"
DEFAULT_KEEP = 2  # checkpoints, without `keep_checkpoints`
Verify = Callable[[Path], None]  # raises WeightsError unless a checkpoint is intact and fits
Changes = Callable[[Path], list[str]]  # what makes the run another one than that of a checkpoint


class RunIdentity(Schema):
    """`run.json`: `run` is the id in the run's checkpoints; `folder` and `inode` tell its own folder from a copy."""

    run: RunId
    folder: Text
    inode: Text
    keep_checkpoints: Positive = DEFAULT_KEEP


class OpenedRun(NamedTuple):
    """The locked folder of a run, and the checkpoint it starts from, if any; `resumes` also from its position."""

    folder: Path
    run: RunIdentity
    lock: lock.Lock | None
    checkpoint: Path | None = None
    resumes: bool = False


def open_run(settings: TrainSettings, verify: Verify, changes_since: Changes) -> OpenedRun:
    """Opens and locks the folder that the settings ask for; called by the main rank alone. Raises OpenSoraError.

    A run resumes in place from the newest checkpoint of its own folder if that is intact, else in a new folder.
    """
    own = _of_launcher(settings) if ranks.restart_count() else []
    checkpoint = newest_intact(own, verify) if own else _find(settings, verify, changes_since)
    if checkpoint is None or (settings.start_from_scratch and not own):
        return _new_run(settings, DEFAULT_KEEP)._replace(checkpoint=checkpoint)
    for change in require_accepted(changes_since(checkpoint), settings.accept_changes):
        logger.warning("continuing although %s", change)
    run, held = identify(checkpoint.parent), None
    if run is not None and _is_latest_of(checkpoint, run):
        held = lock.Lock(checkpoint.parent)
        if not _is_latest_of(checkpoint, run):  # another process went on before it was locked
            held.release()
            held = None
    if run is None or held is None:
        opened = _new_run(settings, run.keep_checkpoints if run else DEFAULT_KEEP)
        logger.info("%s is not the end of a run in its own folder: continuing in %s", checkpoint, opened.folder)
        return opened._replace(checkpoint=checkpoint, resumes=True)
    if settings.keep_checkpoints not in (None, run.keep_checkpoints):
        run = _write(checkpoint.parent, run.model_copy(update={"keep_checkpoints": settings.keep_checkpoints}))
    logger.info("resuming from %s; the last %d checkpoints are kept", checkpoint, run.keep_checkpoints)
    return OpenedRun(checkpoint.parent, run, held, checkpoint, resumes=True)


def identify(folder: Path) -> RunIdentity | None:
    """The run whose own folder this is; None for any other folder, such as a copy."""
    if not (folder / FILE).is_file():
        return None
    try:
        run = check(RunIdentity, read_json(folder / FILE, MediaError))
    except OpenSoraError as error:
        logger.warning("%s", error)
        return None
    return run if run.folder == str(folder.resolve()) or run.inode == str(folder.stat().st_ino) else None


def refuse_running(settings: TrainSettings) -> None:
    """Raises WeightsError, before any work, if another process is training the run to resume."""
    if settings.load in (None, AUTO) or settings.start_from_scratch:
        return
    newest = folders.candidates(settings.load)[0].resolve()
    run = identify(newest.parent)
    if run is not None and _is_latest_of(newest, run):
        lock.Lock(newest.parent).release()


def copy_history(opened: OpenedRun, step: int) -> None:
    """Copies the log up to `step` and the lists of unreadable files into the new folder of a resumed run."""
    old = opened.checkpoint.parent if opened.checkpoint else opened.folder
    if old == opened.folder:
        return
    copy_log(old / "log.jsonl", opened.folder / "log.jsonl", step)
    for file in old.glob("quarantine*.jsonl"):
        if file.is_file():
            shutil.copyfile(file, opened.folder / file.name)


def _find(settings: TrainSettings, verify: Verify, changes_since: Changes) -> Path | None:
    """The checkpoint that `load` names, if any."""
    if settings.load == AUTO:
        if settings.start_from_scratch:
            raise ConfigError("--load auto resumes where a run ended; remove --start-from-scratch")
        return _newest_that_fits(settings, verify, changes_since)
    if settings.load is None:
        return None
    return newest_intact([path.resolve() for path in folders.candidates(settings.load)], verify)


def _of_launcher(settings: TrainSettings) -> list[Path]:
    """The checkpoints of the run that this torchrun started before a restart, newest first."""
    if not ranks.launch_id():
        return []
    loaded = [Path(settings.load).resolve()] if settings.load not in (None, AUTO) else []
    runs = [*loaded, *(path.parent for path in loaded), *folders.run_folders(Path(settings.outputs))]
    for folder in reversed(runs):
        found = lock.holder(folder)
        if found is not None and found.launcher == ranks.launch_id() and folders.checkpoints(folder):
            return [path.resolve() for path in reversed(folders.checkpoints(folder))]
    return []


def newest_intact(found: list[Path], verify: Verify) -> Path:
    """The first intact checkpoint of a list; warns of those before it. Raises WeightsError when none is."""
    broken: list[WeightsError] = []
    for checkpoint in found:
        try:
            verify(checkpoint)
        except WeightsError as error:
            broken.append(error)
            continue
        for problem in broken:
            logger.warning("%s; resuming from %s", problem, checkpoint.name)
        return checkpoint
    more = f" (nor can {len(broken) - 1} older ones be loaded)" if len(broken) > 1 else ""
    raise WeightsError(f"{broken[0]}{more}")


def _newest_that_fits(settings: TrainSettings, verify: Verify, changes_since: Changes) -> Path | None:
    """The latest checkpoint below `outputs` that is intact and of a run with the same fingerprint; else None."""
    outputs = Path(settings.outputs)
    found = [path.resolve() for folder in folders.run_folders(outputs) for path in folders.checkpoints(folder)]
    skipped: dict[Path, str] = {}  # folder -> what differs
    for checkpoint in sorted(found, key=_written, reverse=True):
        try:
            if (changes := changes_since(checkpoint)) and not settings.accept_changes:
                skipped.setdefault(checkpoint.parent, changes[0])
                continue
            verify(checkpoint)
        except WeightsError as error:
            logger.warning("%s", error)
            continue
        return checkpoint
    for folder, change in list(skipped.items())[:3]:
        logger.info("%s is of another run: %s", folder, change)
    logger.info("--load auto: no checkpoint below %s fits, so a new run starts", outputs)
    return None


def _written(checkpoint: Path) -> tuple[float, int, int]:
    try:
        found = manifest.read(checkpoint)
        saved = found.saved if found else checkpoint.stat().st_mtime
    except (WeightsError, OSError):
        saved = 0.0
    name = folders.NAME.fullmatch(checkpoint.name)
    return (saved, int(name[2]), int(name[1])) if name else (saved, 0, 0)


def _is_latest_of(checkpoint: Path, run: RunIdentity) -> bool:
    """Whether a run wrote all checkpoints of its folder, this one last."""
    found = folders.checkpoints(checkpoint.parent)
    return found[-1:] == [checkpoint] and all(manifest.run_of(path) == run.run for path in found)


def _new_run(settings: TrainSettings, keep: int) -> OpenedRun:
    folder = folders.new_run_folder(settings.outputs, settings.model["type"])
    held = lock.Lock(folder)
    run = RunIdentity(
        run=os.urandom(8).hex(), folder=str(folder.resolve()), inode=str(folder.stat().st_ino),
        keep_checkpoints=settings.keep_checkpoints or keep,
    )  # fmt: skip
    return OpenedRun(folder, _write(folder, run), held)


def _write(folder: Path, run: RunIdentity) -> RunIdentity:
    with atomic_write(folder / FILE, error=WeightsError) as [temporary]:
        temporary.write_text(run.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return run


def publish(folder: Path) -> Path:
    """Links `ema` beside the folder of a run to the averaged weights in it; returns the link.

    Returns the folder itself if the link belongs to another run, or the file system has no symbolic links.
    """
    own, link = folder / "ema", folder.parent / "ema"
    logger.info("the averaged weights are in %s", own)
    if link.exists() and not (link.is_symlink() and link.samefile(own)):
        logger.warning("%s belongs to another run and is kept; the result of this run is %s", link, own)
        return own
    folders.point_link(link, f"{folder.name}/ema")
    return link if link.exists() else own
