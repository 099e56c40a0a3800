"""Training checkpoints: one folder each, written whole or not at all, and the way back from them.

Layout (as the documents describe it): `epochE-global_stepN/` holds `model/` (config.json + model.safetensors),
`ema.pt`, `optimizer/optimizer.pt` and `running_states.json`. Whatever a killed run was writing or removing has a
hidden name, and the next save sweeps it away.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora import weights
from opensora.errors import WeightsError
from opensora.hub import one_line
from opensora.training.ema import EMA

NAME = re.compile(r"epoch(\d+)-global_step(\d+)")


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


def find_checkpoint(source: str | os.PathLike[str]) -> Path:
    """The checkpoint folder that `source` names: itself, or the newest one of an experiment folder."""
    folder = Path(source)
    if not folder.is_dir():
        raise WeightsError(f"no training checkpoint at '{source}': give an experiment folder or one of its checkpoints")
    found = [folder] if (folder / "running_states.json").is_file() else checkpoints(folder)
    if not found:
        raise WeightsError(f"'{source}' holds no finished checkpoint (epochE-global_stepN with running_states.json)")
    return found[-1]


def save(
    folder: Path, model: nn.Module, config: dict, ema: EMA, optimizer: Any, scaler: Any, position: dict, keep: int
) -> Path:
    """Writes one checkpoint of `position` = {epoch, step, global_step, batch_size}; drops all but the newest `keep`.

    `config` goes into the model's config.json. Raises WeightsError when the disk refuses, leaving the others alone.
    """
    for leftover in folder.glob(".epoch*"):
        shutil.rmtree(leftover)
    final = folder / f"epoch{position['epoch']}-global_step{position['global_step']}"
    unfinished = folder / f".{final.name}.tmp"
    try:
        (unfinished / "optimizer").mkdir(parents=True)
        weights.save_pretrained(model.state_dict(), unfinished / "model", config)
        torch.save(ema.state_dict(), unfinished / "ema.pt")
        rest = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        torch.save(rest, unfinished / "optimizer" / "optimizer.pt")
        (unfinished / "running_states.json").write_text(json.dumps(position, indent=1))
        _sync(unfinished)
        _discard(final)
        unfinished.rename(final)
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{final}: cannot be written ({one_line(error)})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for old in checkpoints(folder)[:-keep]:
        _discard(old)
    return final


def load(folder: Path, model: nn.Module, ema: EMA, optimizer: Any, scaler: Any) -> dict[str, Any]:
    """Restores everything that `save` wrote into `folder` and returns its position.

    Raises WeightsError when a part is missing, damaged or of another model.
    """
    weights.load_weights(model, folder / "model", rules=())
    ema.load_state_dict(weights.read_state_dict(folder / "ema.pt"))
    try:
        saved = torch.load(folder / "optimizer" / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty unless the run was in fp16
            scaler.load_state_dict(saved["scaler"])
        return json.loads((folder / "running_states.json").read_text())
    except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{folder}: cannot be resumed ({one_line(error)}); try an older checkpoint") from error


def replace_text(path: Path, text: str) -> None:
    """Writes a text file that appears whole or stays as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _discard(folder: Path) -> None:
    """Removes a checkpoint, if it is there; half-removed it no longer has a checkpoint's name."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old")))


def _sync(folder: Path) -> None:
    """Makes sure that the files are on disk before the folder gets its final name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
