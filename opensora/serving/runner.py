"""Computes jobs with the pipeline: alone, or several of one size together where that is faster."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opensora.acceleration.device import pick_device, with_index
from opensora.config.settings import InferenceSettings
from opensora.datasets.video import contact_sheet, write_image
from opensora.errors import Cancelled, OpenSoraError
from opensora.pipeline import draft
from opensora.pipeline.job_spec import JobSpec, Place
from opensora.pipeline.outputs import Output
from opensora.pipeline.pipeline import VideoPipeline
from opensora.pipeline.recipe import frames_digest
from opensora.pipeline.replay import recorded_threads
from opensora.pipeline.step import Step
from opensora.serving.batch_speed import BatchSpeed
from opensora.serving.channel import Outbox
from opensora.serving.folders import NAME, SPRITESHEET, STATE, THUMBNAIL, folder_of
from opensora.serving.models import Models
from opensora.serving.preview import Previews
from opensora.serving.request import VideoRequest

logger = logging.getLogger("opensora")

SAVING_SHARE = 0.05  # of the time, that saving states may take
Task = dict[str, Any]  # a job as the server sends it: id, request, batch_key, media (id -> path)


class Runner:
    """Pipelines that stay loaded, and the jobs that run on them."""

    def __init__(self, channel: Outbox, models: Models, device: str | None) -> None:
        self.channel, self.models = channel, models
        self.device = str(with_index(pick_device(device)))
        self.cancelled: set[str] = set()  # ids; other threads add to it
        self.watched: set[str] = set()  # ids of jobs whose previews somebody looks at; the same
        self._pipelines: dict[str, VideoPipeline] = {}
        self._speed = BatchSpeed()

    def compute(self, tasks: Sequence[Task]) -> None:
        """Computes tasks of one batch key; sends their steps and results."""
        resumed = [task for task in tasks if _state_file(task).exists()]  # each from a step of its own
        fresh = [task for task in tasks if task not in resumed]
        for group in [*([task] for task in resumed), *(self._speed.groups(fresh) if fresh else [])]:
            wanted = [task for task in group if task["id"] not in self.cancelled]
            if wanted:
                self._compute(wanted)
        for task in tasks:
            self.cancelled.discard(task["id"])
            self.watched.discard(task["id"])

    def wants_alone(self, tasks: Sequence[Task]) -> bool:
        """Whether jobs like these are no faster together."""
        return self._speed.is_slower(tasks[0]["batch_key"] or "")

    def _compute(self, tasks: Sequence[Task]) -> None:
        """Computes tasks together. If that fails, those left are computed one by one, to find the one at fault."""
        run = Run(self, tasks)
        try:
            run.run()
        except Cancelled:
            pass
        except Exception as error:
            if len(tasks) > 1:
                for task in run.unfinished:
                    self._compute([task])
                return
            code, message = _explain(error)
            self.channel.send(type="failed", id=tasks[0]["id"], code=code, message=message)

    def pipeline(self, model: str) -> VideoPipeline:
        """The pipeline of a model."""
        if model not in self._pipelines:
            self._pipelines[model] = VideoPipeline(self.settings(model))
        return self._pipelines[model]

    def settings(self, model: str) -> InferenceSettings:
        """The settings of a model on this device."""
        return dataclasses.replace(self.models[model], device=self.device)

    def record_speed(self, key: str, rows: int, seconds: float) -> None:
        """Notes how long a step of so many jobs took."""
        self._speed.record(key, rows, seconds)


class Run:
    """One call of the pipeline for one or several tasks."""

    def __init__(self, runner: Runner, tasks: Sequence[Task]) -> None:
        self.runner, self.channel = runner, runner.channel
        self.places = {str(folder_of(task["id"]) / NAME): task for task in tasks}  # path of the result -> task
        self.unfinished = list(tasks)
        self.key = tasks[0]["batch_key"] or tasks[0]["id"]
        self.previews = Previews()
        self._last_step: float | None = None
        self._next_save = 0.0

    def run(self) -> None:
        """Computes and sends the results. Raises Cancelled once all tasks are cancelled, and what generation raises."""
        tasks = list(self.places.values())
        for task in tasks:
            folder_of(task["id"]).mkdir(parents=True, exist_ok=True)
        stopped = _saved_state(tasks[0]) if len(tasks) == 1 else None
        requests = [VideoRequest(**task["request"]) for task in tasks]
        pipeline = self.runner.pipeline(requests[0].model)
        each = [
            request.settings(self.runner.settings(request.model), task["media"].__getitem__)
            for request, task in zip(requests, tasks, strict=True)
        ]
        whole = dataclasses.replace(each[0], prompt=[one.given["prompt"] for one in requests], batch_size=len(each))
        places = [Place(path, one.seed) for path, one in zip(self.places, each, strict=True)]
        spec = JobSpec(whole, drafts=[stopped] if stopped else (), places=places, to_files=False)
        with recorded_threads(stopped.recipe if stopped else {}):
            for output in pipeline.generate(spec, on_step=self._on_step, keep_loaded=True):
                self._finish(output)

    def _on_step(self, step: Step) -> None:
        now = time.perf_counter()
        if self._last_step is not None:
            self.runner.record_speed(self.key, len(step.requests), now - self._last_step)
        ids = [self.places[request.path]["id"] for request in step.requests]
        if all(self.places[path]["id"] in self.runner.cancelled for path in self.places):
            raise Cancelled("cancelled")
        for id in ids:
            self.channel.send(type="step", id=id, done=step.done, total=step.total)
        self._save(step, ids)
        for row, id in enumerate(ids):
            if id in self.runner.watched and step.done < step.total:
                image = self.previews.next(step, row)
                if image is not None:
                    self.channel.send(type="preview", id=id, done=step.done, image=image)
        self._last_step = time.perf_counter()

    def _save(self, step: Step, ids: Sequence[str]) -> None:
        """Saves the states, as often as takes a small share of the time."""
        begin = time.perf_counter()
        if not step.can_resume or begin < self._next_save:
            return
        for row, id in enumerate(ids):
            step.save(row, folder_of(id) / STATE)
            self.channel.send(type="saved", id=id)
        end = time.perf_counter()
        self._next_save = end + (end - begin) / SAVING_SHARE

    def _finish(self, output: Output) -> None:
        folder = output.path.parent
        task = self.places[str(folder / NAME)]
        self.unfinished.remove(task)
        write_image(output.frames[0], folder / THUMBNAIL)
        write_image(contact_sheet(output.frames), folder / SPRITESHEET)
        (folder / STATE).unlink(missing_ok=True)
        frames, height, width = output.frames.shape[:3]
        self.channel.send(
            type="done", id=task["id"], sha256=frames_digest(output.frames), num_frames=frames, height=height,
            width=width,
        )  # fmt: skip


def _saved_state(task: Task) -> draft.Draft | None:
    """The state to resume a task from; a damaged one is dropped, and the task starts again."""
    file = _state_file(task)
    if not file.exists():
        return None
    try:
        return draft.load(file)
    except OpenSoraError as error:
        if task["continues"]:
            raise
        logger.warning("%s; the job starts again", error)
        file.unlink()
        return None


def _state_file(task: Task) -> Path:
    return folder_of(task["id"]) / STATE


def _explain(error: Exception) -> tuple[str, str]:
    """Code and message of a failure."""
    if isinstance(error, OpenSoraError):
        return "invalid_request", str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out_of_memory", "the device has not enough memory; ask for fewer frames or a smaller size"
    logger.error("a job failed", exc_info=error)
    return "server_error", f"the worker failed ({type(error).__name__}); its log says more"
