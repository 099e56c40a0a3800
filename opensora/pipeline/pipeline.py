"""The pipeline that programs call and the command line uses: models that stay loaded, and a `Job` for each call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opensora.config.settings import InferenceSettings
from opensora.distributed.collectives import broadcast_object
from opensora.distributed.failures import report_first_failure
from opensora.errors import Cancelled, ConfigError
from opensora.pipeline import arguments, draft, watermark
from opensora.pipeline.denoise import timesteps
from opensora.pipeline.generation import Result, StepEnd, generate
from opensora.pipeline.in_memory_media import MediaInput
from opensora.pipeline.job import Job
from opensora.pipeline.job_spec import JobSpec
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.named_adapters import NamedAdapters
from opensora.pipeline.output_folder import output_folder
from opensora.pipeline.outputs import Output
from opensora.pipeline.plan import Plan, plan_job
from opensora.pipeline.step import Step
from opensora.pipeline.video import OUTPUT_TYPES, Video

Callback = Callable[["VideoPipeline", int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]


class Preview(NamedTuple):
    """What a clip looks like after a step: frames uint8 [T, H, W, 3] of the first request of its batch."""

    step: int
    num_steps: int
    frames: np.ndarray
    loop: int = 0


class VideoPipeline(NamedAdapters):
    """Text, image or video in, video out. See docs/python.md.

    The first call loads the weights; they stay loaded. Calls on one pipeline run one after the other; other pipelines
    may run in other threads. A result depends on its prompt, its settings and its sample number, not on the other
    results of a call.
    """

    def __init__(self, settings: InferenceSettings, *, progress: bool = False) -> None:
        """A pipeline whose calls start from `settings`; `progress` shows a bar. Raises ConfigError."""
        super().__init__()
        self.settings, self.progress = settings, progress
        self.models = LoadedModels(settings)
        self._interrupt = False
        self._lock = threading.Lock()
        self._thread: int | None = None  # id of the thread that holds the lock

    @classmethod
    def from_pretrained(
        cls, name: str = "embedded", device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None, *, progress: bool = False, **settings: Any,
    ) -> VideoPipeline:  # fmt: skip
        """The pipeline of a name from `opensora models`, a configuration, a checkpoint folder or a hub id.

        `settings` are those of docs/config.md and arguments of calls, as defaults of every call. Files are located, no
        weight is read. Raises ConfigError and WeightsError.
        """
        pipeline = cls(arguments.load_settings(name, device, dtype, settings), progress=progress)
        pipeline.models.locate()
        return pipeline

    def __call__(
        self, prompt: str | Sequence[str], *, negative_prompt: str | None = None,
        num_frames: int | str | None = None, height: int | None = None, width: int | None = None,
        resolution: str | None = None, aspect_ratio: str | None = None, fps: float | None = None,
        num_inference_steps: int | None = None, guidance_scale: float | None = None,
        seed: int | None = None, generator: torch.Generator | None = None,
        image: MediaInput | None = None, last_frame: MediaInput | None = None,
        extend: MediaInput | None = None, edit: MediaInput | None = None,
        loops: int | None = None, batch_size: int | None = None,
        callback_on_step_end: Callback | None = None, output_type: str = "np", **settings: Any,
    ) -> Any:  # fmt: skip
        """The `Video` of a prompt, or the list of Videos of a list of prompts or of several samples.

        Arguments left out take the pipeline's defaults; docs/python.md lists them all. The callback is called
        after every step with (pipeline, index of the step, timestep, {"latents": x}); it may return other latents, and
        cancel the call. Raises ConfigError, MediaError, WeightsError, and Cancelled after `interrupt`.
        """
        given = arguments.collect_arguments(locals())
        with self._exclusive():
            job = self._job(given)
            several = not isinstance(prompt, str) or job.settings.num_sample > 1
            videos = list(self._run(job, output_type, callback_on_step_end))
        return videos if several else videos[0]

    def stream(
        self, prompt: str | Sequence[str], *, every: int = 1, output_type: str = "np", **given: Any
    ) -> Iterator[Preview | Video]:
        """A `Preview` after each `every`-th step, and each `Video` when it is finished; same arguments as a call."""
        if every < 1:
            raise ConfigError(f"every is {every}; give 1 for a preview after each step, 2 for every second step")
        with self._exclusive():
            job = self._job({"prompt": prompt, **given})
            for event in generate(self.models, job, job.requests, progress=self.progress, keep_loaded=True):
                if isinstance(event, Result):
                    yield self._video(job, event, output_type)
                elif event.state.step % every == 0:
                    yield self._preview(job, event)
                self._check_interrupt()

    def plan(self, prompt: str | Sequence[str], **given: Any) -> Plan:
        """What a call with these arguments would do, and its memory and time; no weight is read."""
        with self._exclusive():
            return plan_job(self.models, self._job({"prompt": prompt, **given}))

    def interrupt(self) -> None:
        """Makes the running call raise Cancelled after the current step. Any thread or callback may call this."""
        self._interrupt = True

    def generate(
        self, spec: JobSpec | None = None, *, on_step: Callable[[Step], None] | None = None, keep_loaded: bool = False
    ) -> Iterator[Output]:
        """Generates the requests of `spec`, by default those of the settings, and writes each to files.

        `on_step` is called after every step; it ends the call by raising an error. `keep_loaded` keeps the text encoder
        for later calls. With `prompt_as_path`, existing results are kept. Raises ConfigError, MediaError or
        WeightsError.
        """
        with self._exclusive(), report_first_failure():
            job = Job(spec or JobSpec(self.settings), self.models)
            layout = self.models.layout
            wanted = broadcast_object([one for one in job.requests if not job.outputs.keeps_existing(one.path)], layout)
            if not wanted:
                return
            with output_folder(job.outputs.folder) if layout.is_main and job.to_files else nullcontext():
                if layout.is_main:
                    job.outputs.check([request.path for request in wanted])
                shown = job.settings.verbose > 0
                for event in generate(self.models, job, wanted, progress=shown, keep_loaded=keep_loaded):
                    if isinstance(event, StepEnd):
                        if on_step:
                            on_step(Step(self.models, job, event))
                    elif layout.is_main:
                        yield self._write(job, event)

    def _job(self, given: Mapping[str, Any]) -> Job:
        settings, media = arguments.call_settings(self.settings, given)
        return Job(JobSpec(settings, to_files=False), self.models, media)

    def _run(self, job: Job, output_type: str, callback: Callback | None) -> Iterator[Video]:
        if output_type not in OUTPUT_TYPES:
            raise ConfigError(f"output_type {output_type!r} is not known; choose one of {', '.join(OUTPUT_TYPES)}")
        with_frames = output_type != "latent" or job.settings.loop > 1
        times = timesteps(job) if callback else []
        events = generate(
            self.models, job, job.requests, with_frames=with_frames, progress=self.progress, keep_loaded=True
        )
        for event in events:
            if isinstance(event, Result):
                yield self._video(job, event, output_type)
            elif callback:
                self._call_back(callback, event, times)
            self._check_interrupt()

    def _call_back(self, callback: Callback, event: StepEnd, times: Sequence[float]) -> None:
        """Calls the callback as diffusers does, with a copy of the latents; "latents" that it returns replace them."""
        index, x = event.state.step - 1, event.state.x
        latents = (callback(self, index, times[index], {"latents": x.clone()}) or {}).get("latents")
        if latents is not None:
            with torch.inference_mode():
                x.copy_(latents)

    def _check_interrupt(self) -> None:
        if self._interrupt:
            raise Cancelled("the call was cancelled by interrupt(); call the pipeline again to restart")

    def _preview(self, job: Job, event: StepEnd) -> Preview:
        frames = Step(self.models, job, event).frames()
        return Preview(event.state.step, event.state.num_steps, frames, event.loop)

    def _video(self, job: Job, result: Result, output_type: str) -> Video:
        frames = watermark.draw(result.frames, job.settings.watermark)
        recipe = job.recipe(result.request, self.models)
        return Video.of(frames, result.latents, job.settings.output_fps, recipe, output_type)

    def _write(self, job: Job, result: Result) -> Output:
        """Writes a result, or a draft with the sampler state to continue from."""
        frames, save_state = watermark.draw(result.frames, job.settings.watermark), None
        recipe = job.recipe(result.request, self.models)
        if result.state is not None:
            final_recipe = {**recipe, "settings": {**recipe["settings"], "draft": False, "steps_until": None}}
            sampler_state: dict[str, Any] = {"state": result.state, "generator": result.generator}
            sampler_state["device"] = str(self.models.device)
            save_state = partial(draft.save, recipe=final_recipe, **sampler_state)
            recipe["draft"] = {"steps": job.stop, "of": result.state.num_steps}
        return job.outputs.write(result.request.path, frames, recipe, save_state)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Waits until no other call runs on this pipeline. Raises ConfigError within a call of the same thread."""
        if self._thread == threading.get_ident():
            raise ConfigError("this pipeline is within a call or stream of this thread; finish or close that one first")
        with self._lock:
            self._thread, self._interrupt = threading.get_ident(), False
            try:
                yield
            finally:
                self._thread = None
