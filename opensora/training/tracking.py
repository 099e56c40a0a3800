"""The log of a run: a line of JSON for each logged step, and curves and videos for tensorboard and wandb."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import socket
import urllib.request
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from opensora.config.settings import TrainSettings
from opensora.datasets.video import write_image, write_video
from opensora.errors import ConfigError, MediaError, WeightsError
from opensora.files import atomic_write, error_message, parse_json

logger = logging.getLogger("opensora")
WANDB_SERVER = "https://api.wandb.ai"
PATIENCE = 5  # seconds to wait for the server


class Backend(Protocol):
    """A dashboard for numbers and videos over steps."""

    def step(self, step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        """Shows the numbers and texts of a step."""

    def video(self, name: str, path: Path, frames: np.ndarray, fps: float, step: int) -> None:
        """Shows frames uint8 [T, H, W, 3], also stored in a file."""

    def close(self) -> None:
        """Flushes."""


class Tracker:
    """Writes `folder/log.jsonl`, samples, tensorboard and wandb logs, on the main rank alone.

    A run resumed at `step` drops the log lines of later steps. When writing fails, on a full disk, it warns once and
    training continues. Raises ConfigError when wandb is requested but unavailable; tensorboard is skipped where it
    is not installed.
    """

    def __init__(self, folder: Path, settings: TrainSettings, is_main: bool = True, step: int = 0) -> None:
        self.folder, self.is_main = Path(folder), is_main
        self.backends: list[Backend] = []
        self._warned = False  # that the log cannot be written
        if not is_main:
            return
        copy_log(self.folder / "log.jsonl", self.folder / "log.jsonl", step)
        if settings.tensorboard and _has_tensorboard():
            self.backends.append(TensorBoard(self.folder, step))
        if settings.wandb:
            self.backends.append(WeightsAndBiases(self.folder, settings))

    def step(self, line: dict[str, Any]) -> None:
        """Logs a line for `line["step"]`. Numbers become curves, everything else text, NaN included."""
        if not self.is_main:
            return
        line = {name: _plain(value) for name, value in line.items()}
        self._write(json.dumps(line, allow_nan=False) + "\n")
        rest = {name: value for name, value in line.items() if name != "step"}
        numbers = {name: value for name, value in rest.items() if type(value) in (int, float)}
        texts = {name: json.dumps(value) for name, value in rest.items() if name not in numbers}
        self._show(lambda backend: backend.step(line["step"], numbers, texts))

    def _write(self, line: str) -> None:
        try:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "%s: log lines are missing (%s); training continues",
                    self.folder / "log.jsonl",
                    error_message(error),
                )
            self._warned = True

    def _show(self, show: Callable[[Backend], None]) -> None:
        """Calls `show` for each backend; drops a backend that cannot write."""
        for backend in list(self.backends):
            try:
                show(backend)
            except OSError as error:
                logger.warning("%s is left out (%s); training continues", type(backend).__name__, error_message(error))
                self.backends.remove(backend)

    def video(self, name: str, frames: np.ndarray, fps: float, step: int) -> Path | None:
        """Writes frames uint8 [T, H, W, 3] into `folder/samples`, as mp4 or, of a single frame, png; shows them.

        Returns the file; None on other ranks.
        """
        if not self.is_main:
            return None
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        path = folder / f"step{step:07d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-')[:80]}"
        if len(frames) == 1:
            path = write_image(frames[0], path.with_name(f"{path.name}.png"))
        else:
            path = write_video(frames, path.with_name(f"{path.name}.mp4"), fps)
        self._show(lambda backend: backend.video(f"samples/{name}", path, frames, fps, step))
        return path

    def close(self) -> None:
        """Flushes and closes; the tracker is not used afterwards."""
        self._show(lambda backend: backend.close())
        self.backends = []


class TensorBoard:
    """Event files in `folder/tensorboard`."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = {"purge_step": step + 1} if step else {}
        self.writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=30, **purge)

    def step(self, step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        for name, text in texts.items():
            self.writer.add_text(name, text, step)

    def video(self, name: str, path: Path, frames: np.ndarray, fps: float, step: int) -> None:
        """It plays GIFs only."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        shape = dict(height=frames.shape[1], width=frames.shape[2], colorspace=3)
        image = Summary.Image(encoded_image_string=_gif(frames, fps), **shape)
        events: Any = self.writer.file_writer
        events.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A wandb run, the same one when training resumes; offline if its server cannot be reached.

    Raises ConfigError when the package is missing or nobody is logged in.
    """

    def __init__(self, folder: Path, settings: TrainSettings) -> None:
        self.wandb, config = import_wandb(), dataclasses.asdict(settings)
        mode = os.environ.get("WANDB_MODE") or ("offline" if settings.offline or not _server_answers() else "online")
        try:
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", "opensora"), name=folder.name, id=_run_id(folder),
                dir=str(folder), config=config, mode=mode, resume="allow",
                settings=self.wandb.Settings(console="off"),
            )  # fmt: skip
        except self.wandb.errors.Error as error:
            remedy = "run `wandb login`, set WANDB_MODE=offline, or remove --wandb"
            raise ConfigError(f"wandb does not start ({' '.join(str(error).split())}); {remedy}") from error
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def step(self, step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        self.run.log({**numbers, **texts, "step": step})

    def video(self, name: str, path: Path, frames: np.ndarray, fps: float, step: int) -> None:
        shown = self.wandb.Image(str(path)) if len(frames) == 1 else self.wandb.Video(str(path), format="mp4")
        self.run.log({name: shown, "step": step})

    def close(self) -> None:
        self.run.finish()


def import_wandb() -> Any:
    """The module wandb. Raises ConfigError where it is not installed; a folder of that name does not count."""
    try:
        import wandb

        wandb.init  # noqa: B018
    except (ImportError, AttributeError) as error:
        remedy = "install it with `pip install wandb`, or remove --wandb"
        raise ConfigError(f"--wandb needs the package wandb, which is not installed; {remedy}") from error
    return wandb


def copy_log(old: Path, new: Path, step: int) -> None:
    """Copies a log without the lines after `step`, which will be trained again; both paths may be one file.

    Lines that are damaged are left out. Raises WeightsError where the new one cannot be written.
    """
    try:
        lines = old.read_bytes().splitlines(keepends=True) if old.is_file() else None
    except OSError as error:
        raise WeightsError(f"{old}: cannot be read ({error_message(error)})") from error
    if lines is None:
        return
    steps = [_step_of(line) for line in lines]
    if damaged := steps[:-1].count(None):  # the last one may be cut off, by a kill
        logger.warning("%s: %d damaged lines are left out", old, damaged)
    with atomic_write(new, error=WeightsError) as [temporary]:
        temporary.write_bytes(
            b"".join(line for line, at in zip(lines, steps, strict=True) if at is not None and at <= step)
        )


def _step_of(line: bytes) -> int | None:
    """The step that a line of the log is about; None for a damaged line."""
    try:
        value = parse_json(line, "a line of the log") if line.endswith(b"}\n") else None
    except MediaError:
        return None
    at = value.get("step") if isinstance(value, dict) else None
    return at if type(at) is int else None


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _has_tensorboard() -> bool:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        return False
    return True


def _server_answers() -> bool:
    """Whether wandb's server can be reached; where a proxy stands between, that is left to wandb."""
    if urllib.request.getproxies():
        return True
    url = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_SERVER))
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), PATIENCE).close()
    except OSError:
        return False
    return True


def _run_id(folder: Path) -> str:
    """The name of this folder's run for wandb's server, drawn once."""
    path = folder / "wandb" / "run_id"
    if not path.is_file():
        with atomic_write(path, make_folders=True) as [temporary]:
            temporary.write_text(os.urandom(6).hex())
    return path.read_text().strip()


def _gif(frames: np.ndarray, fps: float) -> bytes:
    from PIL import Image

    first, *others = (Image.fromarray(frame) for frame in frames)
    file = BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=1000 / fps, loop=0)
    return file.getvalue()
