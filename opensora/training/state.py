"""Training checkpoints: one folder each, written whole or not at all, and the way back from them.

Layout (as the documents describe it): `epochE-global_stepN/` holds `model/` (config.json + model.safetensors),
`ema.pt`, `optimizer/optimizer.pt` and `running_states.json`. Whatever a killed run was writing or removing has a
hidden name, and the next save sweeps it away. `latest` points to the newest one. Files hold whole tensors, whatever
the number of ranks, and are written while training goes on.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora import weights
from opensora.acceleration.parallel import Layout
from opensora.acceleration.whole import fill, spread, whole
from opensora.errors import WeightsError
from opensora.hub import one_line
from opensora.training.ema import EMA

NAME = re.compile(r"epoch(\d+)-global_step(\d+)")
LATEST = "latest"


def experiment_folder(outputs: str, model_type: str) -> Path:
    """A new folder `outputs/NNN-MODEL`, numbered after the highest number that is there."""
    root = Path(outputs)
    root.mkdir(parents=True, exist_ok=True)
    taken = [int(match[1]) for path in root.iterdir() if (match := re.match(r"(\d{3,})-", path.name))]
    folder = root / f"{max(taken, default=-1) + 1:03d}-{model_type.replace('/', '-')}"
    folder.mkdir()
    return folder


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of an experiment folder, oldest first."""
    found = [(int(match[2]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def checkpoint_folder(folder: Path, position: dict[str, Any]) -> Path:
    """Where the checkpoint of a position lies."""
    return folder / f"epoch{position['epoch']}-global_step{position['global_step']}"


def find_checkpoint(source: str | os.PathLike[str]) -> Path:
    """The checkpoint folder that `source` names: itself, or the newest one of an experiment folder."""
    folder = Path(source)
    if not folder.is_dir():
        raise WeightsError(f"no training checkpoint at '{source}': give an experiment folder or one of its checkpoints")
    found = [folder] if (folder / "running_states.json").is_file() else checkpoints(folder)
    if not found:
        raise WeightsError(f"'{source}' holds no finished checkpoint (epochE-global_stepN with running_states.json)")
    return found[-1]


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


def write(folder: Path, taken: Snapshot, config: dict, position: dict, keep: int) -> Path:
    """Writes one checkpoint of `position` = {epoch, step, global_step, batch_size}; drops all but the newest `keep`.

    `config` goes into the model's config.json. Raises WeightsError when the disk refuses, leaving the others alone.
    """
    for leftover in folder.glob(".epoch*"):
        shutil.rmtree(leftover)
    final = checkpoint_folder(folder, position)
    unfinished = folder / f".{final.name}.tmp"
    try:
        (unfinished / "optimizer").mkdir(parents=True)
        weights.save_pretrained(taken.model, unfinished / "model", config)
        torch.save(taken.ema, unfinished / "ema.pt")
        torch.save(taken.rest, unfinished / "optimizer" / "optimizer.pt")
        (unfinished / "running_states.json").write_text(json.dumps(position, indent=1))
        _sync(unfinished)
        _discard(final)
        unfinished.rename(final)
        _point(folder / LATEST, final.name)
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{final}: cannot be written ({one_line(error)})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for old in checkpoints(folder)[:-keep]:
        _discard(old)
    return final


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


def read_position(folder: Path) -> dict[str, Any]:
    """The position that was saved with a checkpoint. Raises WeightsError when it cannot be read."""
    try:
        return json.loads((folder / "running_states.json").read_text())
    except (OSError, ValueError) as error:
        raise _unusable(folder, error) from error


def load(folder: Path, model: nn.Module, ema: EMA, optimizer: Any, scaler: Any) -> dict[str, Any]:
    """Restores everything that was written into `folder`, whatever the number of ranks, and returns its position.

    Raises WeightsError when a part is missing, damaged or of another model.
    """
    position = read_position(folder)
    _restore(model, weights.read_state_dict(folder / "model"), folder)
    ema.load_state_dict(weights.read_state_dict(folder / "ema.pt"))
    try:
        saved = torch.load(folder / "optimizer" / "optimizer.pt", map_location="cpu", weights_only=True)
        _restore_optimizer(optimizer, saved["optimizer"])
        if saved["scaler"]:  # empty unless the run was in fp16
            scaler.load_state_dict(saved["scaler"])
    except (OSError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise _unusable(folder, error) from error
    return position


def _restore(model: nn.Module, saved: dict[str, Tensor], folder: Path) -> None:
    own = model.state_dict()
    wrong = [name for name in {*own, *saved} if name not in own or name not in saved]
    wrong += [name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape]
    if wrong:
        raise WeightsError(f"{folder} does not fit {type(model).__name__}: {len(wrong)} tensors, such as {min(wrong)}")
    for name, tensor in own.items():
        fill(tensor, saved[name])


def _restore_optimizer(optimizer: Any, saved: dict[str, Any]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name: spread(value, parameters[index]) if value.shape == parameters[index].shape else value
            for name, value in own.items()
        }
        for index, own in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": moments})


def _unusable(folder: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{folder}: cannot be resumed ({one_line(error)}); try an older checkpoint")


def replace_text(path: Path, text: str) -> None:
    """Writes a text file that appears whole or stays as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _discard(folder: Path) -> None:
    """Removes a checkpoint, if it is there; half-removed it no longer has a checkpoint's name."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old")))


def _point(link: Path, name: str) -> None:
    """Makes `link` lead to its neighbour `name`, from one moment to the next."""
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
