"""What a request would do, before any weight is read: its frames, its size, and the memory and time it will take."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any

from opensora.acceleration.memory_plan import PLANS, MemoryPlan
from opensora.config.settings import InferenceSettings
from opensora.errors import OpenSoraError
from opensora.models.vae.vae import frames_at_once
from opensora.pipeline import plan_report, prompt_refiner
from opensora.pipeline.argument_names import MODEL_SETTINGS
from opensora.pipeline.generation import check_requests
from opensora.pipeline.job import Job
from opensora.pipeline.job_spec import JobSpec
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.mask_strategy import ClipConditioning
from opensora.pipeline.output_folder import output_folder
from opensora.pipeline.plan_notes import adjustments
from opensora.pipeline.plan_report import duration, gib
from opensora.pipeline.request import SPATIAL_FACTOR, Request
from opensora.pipeline.stage_costs import ResourceEstimate, Stage
from opensora.pipeline.text_encoding import portions
from opensora.profiling import memory_meter, speed_history
from opensora.profiling.cost_model import CostModel
from opensora.profiling.speed_history import Span

Changes = Mapping[str, Any]  # settings and their new values
LIBRARIES = 100 * 2**20  # of CPU memory, for libraries that load with the first computation
NEIGHBORS = 3  # how many legal sizes to show below and above the requested one


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked request: what it generates, and the memory and time that it takes."""

    models: LoadedModels
    job: Job
    estimate: ResourceEstimate
    requests: list[Request]
    notes: list[str]
    base: int  # bytes that the process occupies before the first stage
    grid: tuple[int, int, int]  # legal sizes are multiples of these frames, rows and columns of pixels

    @cached_property
    def memory_plan(self) -> MemoryPlan:
        """The memory plan of the settings, or the fastest that fits."""
        return self.estimate.choose()

    @property
    def timelines(self) -> list[list[ClipConditioning]]:
        """The conditioning of each clip of each request."""
        return self.estimate.timelines

    @property
    def stages(self) -> list[Stage]:
        """The stages in order: text, encoding, sampling, decoding."""
        return self.estimate.stages(self.memory_plan)

    @property
    def num_frames(self) -> int:
        """Frames of each result."""
        loops, frames = self.job.settings.loop, self.job.size.num_frames
        whole = loops * (frames - self.job.overlap) + self.job.overlap
        return frames if self.job.stop else whole

    @property
    def memory(self) -> int:
        """Peak memory in bytes: of the process on a CPU, else of the device."""
        return self._base + self.estimate.peak(self.memory_plan)

    @property
    def least(self) -> int:
        """Bytes of the weights alone."""
        return self._base + self.estimate.least(self.memory_plan)

    @property
    def _base(self) -> int:
        return self.base if self.estimate.on_host else 0

    @property
    def seconds(self) -> float:
        """Seconds for all results, without reading the weights."""
        return sum(span.least for span in self.spans)

    @property
    def spans(self) -> list[Span]:
        """How long each stage takes."""
        device, dtype = self.models.device, self.models.dtype
        return [speed_history.span(stage.cost, device, stage.name, dtype) for stage in self.stages]

    @property
    def available(self) -> int | None:
        """Available memory of the device in bytes, None if unknown."""
        free = memory_meter.available_memory(self.models.device)
        return None if free is None else free + self._base

    @property
    def fits(self) -> bool:
        return self.available is None or self.memory <= self.available

    @property
    def near_sizes(self) -> list[tuple[int, int]]:
        """Sizes (H, W) near the requested one, of about its aspect ratio, that need no rounding; ascending."""
        _, *steps = self.grid
        height, width = self.job.size[1:]
        middle = max(round(height / steps[0]), 1)
        found = []
        for rows in range(max(middle - NEIGHBORS, 1), middle + NEIGHBORS + 1):
            columns = max(round(rows * steps[0] * width / height / steps[1]), 1)
            found.append((rows * steps[0], columns * steps[1]))
        return list(dict.fromkeys(found))

    @property
    def near_lengths(self) -> list[int]:
        """Numbers of frames near the requested one that are whole groups of the autoencoder."""
        group, frames = self.grid[0], self.job.size.num_frames
        middle = max(round(frames / group), 1)
        return sorted({1, *(count * group for count in range(max(middle - NEIGHBORS, 1), middle + NEIGHBORS + 1))})

    def cheaper(self) -> str | None:
        """Flags that reduce the request as little as possible so that it fits, or None."""
        if self.available is None:
            return None
        for other in PLANS[PLANS.index(self.memory_plan) + 1 :]:
            if self._base + self.estimate.peak(other) <= self.available:
                return f"--memory {other.name}"
        if self.least > self.available:
            return None
        for trials in self._smaller():  # each list is descending: if the last fits, bisection finds the first that does
            if trials and self._fits_with(trials[-1][1]):
                last = len(trials) - 1
                return trials[bisect_left(trials, True, hi=last, key=lambda trial: self._fits_with(trial[1]))][0]
        return None

    def _smaller(self) -> Iterator[list[tuple[str, Changes]]]:
        """Flags and the settings that they change: smaller decoder batches, fewer frames, fewer pixels."""
        settings, size, steps = self.job.settings, self.job.size, self.grid[1:]
        vae, many = settings.section("vae"), frames_at_once(*self.job.frame_size) > 1
        smooths = vae["type"] == "VideoAutoencoderKLTemporalDecoder"  # the frames of a batch, however large they are
        if (many or smooths) and ("micro_batch_size" in vae or vae["type"] == "OpenSoraVAE_V1_2"):
            yield [("--cfg-options vae.micro_batch_size=1", {"vae": {**vae, "micro_batch_size": 1}})]
        if settings.loop == 1:
            lengths = [count for count in reversed(self.near_lengths) if 1 < count < size.num_frames]
            yield [(f"--num-frames {count}", {"num_frames": count}) for count in lengths]
        pairs = [[max(round(side * part / step), 1) * step for side, step in zip(size[1:], steps, strict=True)]
                 for part in (0.85, 0.7, 0.5, 0.35, 0.25)]  # fmt: skip
        yield [(f"--image-size {height} {width}", {"image_size": (height, width)}) for height, width in pairs]

    def _fits_with(self, changes: Changes) -> bool:
        """Whether the same request with other settings is legal and fits under this memory plan."""
        settings = dataclasses.replace(self.job.settings, **changes)
        try:
            models = self.models if MODEL_SETTINGS.isdisjoint(changes) else LoadedModels(settings)
            job = Job(JobSpec(settings, to_files=self.job.to_files), models)
            other = plan_job(models, job, self.estimate.costs)
        except OpenSoraError:
            return False
        return self.available is None or self._base + other.estimate.peak(self.memory_plan) <= self.available

    def __str__(self) -> str:
        size, notes = self.job.size, [f"note: {note}" for note in self.notes]
        sizes = ", ".join(f"{height}x{width}" for height, width in self.near_sizes)
        return "\n".join([
            *plan_report.clips(self.job, self.requests, self.num_frames),
            "",
            f"legal sizes near {size.height}x{size.width} (multiples of {SPATIAL_FACTOR}): {sizes}",
            f"legal lengths near {size.num_frames}: {', '.join(map(str, self.near_lengths))}",
            "",
            *([*notes, ""] if notes else []),
            *self._costs(),
        ])  # fmt: skip

    def _costs(self) -> Iterator[str]:
        spans, free = self.spans, self.available
        yield from plan_report.costs(self.stages, spans)
        limit = "" if free is None else f" of {gib(free)} free on {self.models.device}"
        yield f"peak {gib(self.memory)}{limit}, {duration(spans)} beside reading the weights"
        longest = max(spans, key=lambda span: span.most)
        yield f"times: by {longest.source}; longer while the machine has other things to do"
        yield f"memory plan: {self.memory_plan.name}"
        if not self.fits:
            found = self.cheaper()
            yield "it does not fit; " + (f"this does: {found}" if found else "nothing smaller was found that does")


def make_plan(settings: InferenceSettings, spec: JobSpec | None = None) -> Plan:
    """The plan of `spec`, by default of the requests of the settings.

    Raises whatever generation would raise before it reads a weight. Downloads only references; for a model that is not
    on this machine, the published one of its type is assumed.
    """
    models = LoadedModels(settings)
    return plan_job(models, Job(spec or JobSpec(settings), models))


def plan_job(models: LoadedModels, job: Job, costs: CostModel | None = None) -> Plan:
    """The plan of a job on models, which need no weights and do not change. `costs` may have counted some of it."""
    wanted = [request for request in job.requests if not job.outputs.keeps_existing(request.path)]
    with output_folder(job.outputs.folder) if job.to_files else nullcontext():
        if job.to_files:
            job.outputs.check([request.path for request in wanted])
        absent = models.locate_without_downloads()
        built = models.build(job.size)
        refines = prompt_refiner.is_enabled(job.settings)  # then the lengths of the texts are not known yet
        requests = check_requests(models, job, wanted, built._replace(text_encoder=None) if refines else built)
    notes = ["the prompts will be refined by a language model first; it has not been asked"] if refines else []
    if job.stop:
        part = " of the first clip" if job.settings.loop > 1 else ""
        notes.append(f"stops after {job.stop} of {job.scheduler.num_steps} steps{part}, to be continued")
    notes += [f"{request.path} exists and is kept" for request in job.requests if request not in wanted]
    notes += [f"{part}: '{getattr(models.settings, part)['from_pretrained']}' would be downloaded" for part in absent]
    notes += [note for request in requests for note in adjustments(job, request)]
    grid = (built.vae.group[0], SPATIAL_FACTOR, SPATIAL_FACTOR)
    again = len(portions(job, requests)) > 1
    estimate = ResourceEstimate(models, built, job, requests, again, costs)
    base = memory_meter.resident_memory() + LIBRARIES
    return Plan(models, job, estimate, requests, list(dict.fromkeys(notes)), base, grid)
