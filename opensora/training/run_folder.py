"""The folder of a run: where it goes on, and which checkpoints are its own."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from opensora.config.schema import Positive, Schema, Text, check
from opensora.config.settings import TrainSettings
from opensora.distributed import peers
from opensora.errors import ConfigError, MediaError, OpenSoraError, WeightsError
from opensora.files import read_json, replacing
from opensora.training import lock
from opensora.training.checkpoint import manifest, state
from opensora.training.checkpoint.fingerprint import require_accepted
from opensora.training.checkpoint.manifest import RunId
from opensora.training.tracking import copy_log

logger = logging.getLogger("opensora")
FILE = "run.json"
AUTO = "auto"
KEPT = 2  # checkpoints, unless `keep_checkpoints` says otherwise
Check = Callable[[Path], None]  # raises WeightsError unless a checkpoint is whole
Differs = Callable[[Path], list[str]]  # what makes a checkpoint that of another run


class Run(Schema):
    """`run` is its name in the checkpoints it wrote; `folder` and `inode` tell its own folder from a copy."""

    run: RunId
    folder: Text
    inode: Text
    keep_checkpoints: Positive = KEPT


class Opened(NamedTuple):
    """The folder of a run, its lock, and the checkpoint to begin with, if any, at its position if `goes_on`."""

    folder: Path
    run: Run
    lock: lock.Lock | None
    checkpoint: Path | None = None
    goes_on: bool = False


def open_run(settings: TrainSettings, check_whole: Check, differs: Differs) -> Opened:
    """The folder that the settings ask for, locked. Raises OpenSoraError when there is none to have.

    A run goes on in place where the newest checkpoint of its own folder is whole, and otherwise in a new folder. The
    main rank alone calls this.
    """
    own = _of_launcher(settings) if peers.restarts() else []
    checkpoint = newest_whole(own, check_whole) if own else _find(settings, check_whole, differs)
    if checkpoint is None or (settings.start_from_scratch and not own):
        return _begin(settings, KEPT)._replace(checkpoint=checkpoint)
    for change in require_accepted(differs(checkpoint), settings.accept_changes):
        logger.warning("going on although %s", change)
    run, held = identify(checkpoint.parent), None
    if run is not None and _is_end_of(checkpoint, run):
        held = lock.Lock(checkpoint.parent)
        if not _is_end_of(checkpoint, run):  # it went on before it was locked
            held.release()
            held = None
    if run is None or held is None:
        opened = _begin(settings, run.keep_checkpoints if run else KEPT)
        logger.info("%s is not the end of a run in its own folder: going on in %s", checkpoint, opened.folder)
        return opened._replace(checkpoint=checkpoint, goes_on=True)
    if settings.keep_checkpoints not in (None, run.keep_checkpoints):
        run = _write(checkpoint.parent, run.model_copy(update={"keep_checkpoints": settings.keep_checkpoints}))
    logger.info("going on from %s; the last %d checkpoints are kept", checkpoint, run.keep_checkpoints)
    return Opened(checkpoint.parent, run, held, checkpoint, goes_on=True)


def identify(folder: Path) -> Run | None:
    """The run whose own folder this is; None for any other folder, a copy of a run's included."""
    if not (folder / FILE).is_file():
        return None
    try:
        run = check(Run, read_json(folder / FILE, MediaError))
    except OpenSoraError as error:
        logger.warning("%s", error)
        return None
    return run if run.folder == str(folder.resolve()) or run.inode == str(folder.stat().st_ino) else None


def refuse_a_second(settings: TrainSettings) -> None:
    """Raises WeightsError where the run to go on with is being trained by another process: before any work."""
    if settings.load in (None, AUTO) or settings.start_from_scratch:
        return
    newest = state.candidates(settings.load)[0].resolve()
    run = identify(newest.parent)
    if run is not None and _is_end_of(newest, run):
        lock.Lock(newest.parent).release()


def carry_over(opened: Opened, step: int) -> None:
    """Brings what belongs to the run, up to a step, along into a new folder: its log, and the files it left out."""
    old = opened.checkpoint.parent
    if old == opened.folder:
        return
    copy_log(old / "log.jsonl", opened.folder / "log.jsonl", step)
    for file in old.glob("quarantine*.jsonl"):
        if file.is_file():
            shutil.copyfile(file, opened.folder / file.name)


def _find(settings: TrainSettings, check_whole: Check, differs: Differs) -> Path | None:
    """The checkpoint that `load` means, if any."""
    if settings.load == AUTO:
        if settings.start_from_scratch:
            raise ConfigError("--load auto goes on where a run ended; leave out --start-from-scratch")
        return _newest_that_fits(settings, check_whole, differs)
    if settings.load is None:
        return None
    return newest_whole([path.resolve() for path in state.candidates(settings.load)], check_whole)


def _of_launcher(settings: TrainSettings) -> list[Path]:
    """The checkpoints of the run that this very torchrun started before, the newest first."""
    if not peers.launcher():
        return []
    loaded = [Path(settings.load).resolve()] if settings.load not in (None, AUTO) else []
    folders = [*loaded, *(path.parent for path in loaded), *state.experiments(Path(settings.outputs))]
    for folder in reversed(folders):
        found = lock.holder(folder)
        if found is not None and found.launcher == peers.launcher() and state.checkpoints(folder):
            return [path.resolve() for path in reversed(state.checkpoints(folder))]
    return []


def newest_whole(found: list[Path], check_whole: Check) -> Path:
    """The first of some checkpoints that is whole; those before it are named. Raises WeightsError when none is."""
    broken: list[WeightsError] = []
    for checkpoint in found:
        try:
            check_whole(checkpoint)
        except WeightsError as error:
            broken.append(error)
            continue
        for error in broken:
            logger.warning("%s; going on from %s", error, checkpoint.name)
        return checkpoint
    more = f" (nor can {len(broken) - 1} older ones be used)" if len(broken) > 1 else ""
    raise WeightsError(f"{broken[0]}{more}")


def _newest_that_fits(settings: TrainSettings, check_whole: Check, differs: Differs) -> Path | None:
    """The checkpoint below `outputs` that was written last, of those that are whole and of such a run; else None."""
    outputs = Path(settings.outputs)
    found = [path.resolve() for folder in state.experiments(outputs) for path in state.checkpoints(folder)]
    passed: dict[Path, str] = {}  # folder -> why it is passed over
    for checkpoint in sorted(found, key=_written, reverse=True):
        try:
            if (changes := differs(checkpoint)) and not settings.accept_changes:
                passed.setdefault(checkpoint.parent, changes[0])
                continue
            check_whole(checkpoint)
        except WeightsError as error:
            logger.warning("%s", error)
            continue
        return checkpoint
    for folder, why in list(passed.items())[:3]:
        logger.info("%s is of another run: %s", folder, why)
    logger.info("--load auto: no checkpoint below %s fits, so the run begins", outputs)
    return None


def _written(checkpoint: Path) -> tuple[float, int, int]:
    try:
        made = manifest.read(checkpoint)
        saved = made.saved if made else checkpoint.stat().st_mtime
    except (WeightsError, OSError):
        saved = 0.0
    return saved, *(int(number) for number in state.NAME.fullmatch(checkpoint.name).groups()[::-1])


def _is_end_of(checkpoint: Path, run: Run) -> bool:
    """Whether a run wrote all that its folder holds, this checkpoint last."""
    found = state.checkpoints(checkpoint.parent)
    return found[-1:] == [checkpoint] and all(manifest.run_of(path) == run.run for path in found)


def _begin(settings: TrainSettings, keep: int) -> Opened:
    folder = state.experiment_folder(settings.outputs, settings.model["type"])
    held = lock.Lock(folder)
    run = Run(
        run=os.urandom(8).hex(), folder=str(folder.resolve()), inode=str(folder.stat().st_ino),
        keep_checkpoints=settings.keep_checkpoints or keep,
    )  # fmt: skip
    return Opened(folder, _write(folder, run), held)


def _write(folder: Path, run: Run) -> Run:
    with replacing(folder / FILE, error=WeightsError) as [temporary]:
        temporary.write_text(run.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return run


def publish(folder: Path) -> Path:
    """Has `ema` beside the folder of a run lead to `ema` in it, and returns that; another run's stays, which is said.

    Where there are no links the result is in the folder of the run alone.
    """
    own, link = folder / "ema", folder.parent / "ema"
    logger.info("the averaged weights are in %s", own)
    if link.exists() and not (link.is_symlink() and link.samefile(own)):
        logger.warning("%s is the result of another run and stays; that of this one is %s", link, own)
        return own
    state.point(link, f"{folder.name}/ema")
    return link if link.exists() else own
