"""What a request would do, before any weight is read: its frames, its size, and the memory and time it will take."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

from opensora.acceleration.memory_plan import PLANS, MemoryPlan
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError
from opensora.pipeline import prompt_refiner
from opensora.pipeline.generation import check
from opensora.pipeline.job import Job
from opensora.pipeline.job_spec import JobSpec
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.mask_strategy import ClipConditioning, ReferencePlacement, parse_mask_strategy
from opensora.pipeline.output_folder import output_folder
from opensora.pipeline.request import SPATIAL_FACTOR, Request
from opensora.pipeline.stage_costs import ResourceEstimate, Stage
from opensora.pipeline.text_encoding import portions
from opensora.profiling import memory_meter, speed_history
from opensora.profiling.speed_history import Span

GIB = 2**30
LIBRARIES = 100 * 2**20  # of a host's memory, for what is loaded only once numbers are computed
NEAR = 3  # legal sizes shown below and above the one asked for


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request that nothing is wrong with: what it generates, and the memory and time that it takes."""

    models: LoadedModels
    job: Job
    estimate: ResourceEstimate
    memory_plan: MemoryPlan
    requests: list[Request]
    notes: list[str]
    base: int  # bytes that the process occupies before the first stage
    grid: tuple[int, int, int]  # frames, rows and columns of pixels that the autoencoder takes together

    @property
    def timelines(self) -> list[list[ClipConditioning]]:
        """The clips of each request and the frames that they are given."""
        return [self.job.timelines[request] for request in self.requests]

    @property
    def stages(self) -> list[Stage]:
        """Text, autoencoder and model, and what they do, in order."""
        return self.estimate.stages(self.memory_plan)

    @property
    def num_frames(self) -> int:
        """Frames of each result."""
        loops, frames = self.job.settings.loop, self.job.size.num_frames
        whole = loops * (frames - self.job.overlap) + self.job.overlap
        return frames if self.job.stop else whole

    @property
    def memory(self) -> int:
        """Bytes at the peak: of the process on a host, else of the device."""
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
        """Seconds for all results, reading the weights apart."""
        return sum(span.least for span in self.spans)

    @property
    def spans(self) -> list[Span]:
        """How long each stage takes."""
        device, dtype = self.models.device, self.models.dtype
        return [speed_history.span(stage.cost, device, stage.name, dtype) for stage in self.stages]

    @property
    def room(self) -> int | None:
        """Bytes that the device has for this, None where nobody says."""
        free = memory_meter.available_memory(self.models.device)
        return None if free is None else free + self._base

    @property
    def fits(self) -> bool:
        return self.room is None or self.memory <= self.room

    def __str__(self) -> str:
        return "\n".join([*self._timeline(), "", *self._size(), *self._notes(), "", *self._costs()])

    def _timeline(self) -> Iterator[str]:
        job, size = self.job, self.job.size
        height, width = job.frame_size
        kind = "image" if self.num_frames == 1 else f"{self.num_frames} frames at {job.settings.output_fps:g} fps"
        for request, clips in zip(self.requests, self.timelines, strict=True):
            yield f"{request.path}: {kind}, {height}x{width}, from {_short(request.prompt)}"
            given = _names(request)
            if len(clips) > 1:
                joined = f"{len(clips)} clips of {size.num_frames} frames, each taking over {job.overlap}"
                yield f"  {joined} from the one before"
            for loop, clip in enumerate(clips):
                yield f"  clip {loop}: {len(clip.edit)} latent frames"
                yield from (f"    {line}" for line in describe(clip, given))

    def _size(self) -> Iterator[str]:
        size = self.job.size
        near = ", ".join(f"{h}x{w}" for h, w in near_sizes(self))
        yield f"legal sizes near {size.height}x{size.width} (multiples of {SPATIAL_FACTOR}): {near}"
        yield f"legal lengths near {size.num_frames}: " + ", ".join(map(str, near_lengths(self)))

    def _notes(self) -> Iterator[str]:
        if self.notes:
            yield from ("", *(f"note: {note}" for note in self.notes))

    def _costs(self) -> Iterator[str]:
        spans = self.spans
        yield f"{'stage':<12}{'weights':>10}{'work':>10}{'time':>20}"
        for stage, span in zip(self.stages, spans, strict=True):
            yield f"{stage.name:<12}{_gib(stage.weights):>10}{_gib(stage.cost.peak):>10}{_range_of([span]):>20}"
        room = "" if self.room is None else f" of {_gib(self.room)} free on {self.models.device}"
        yield f"peak {_gib(self.memory)}{room}, {_range_of(spans)} beside reading the weights"
        longest = max(spans, key=lambda span: span.most)
        yield f"times: by {longest.source}; longer while the machine has other things to do"
        yield f"memory plan: {self.memory_plan.name}"
        if not self.fits:
            found = cheaper(self)
            yield "it does not fit; " + (f"this does: {found}" if found else "nothing smaller was found that does")


def make_plan(settings: InferenceSettings, spec: JobSpec | None = None) -> Plan:
    """What a request would do: `spec`, by default that of the settings.

    Raises whatever generation would raise before it reads a weight.

    Nothing is downloaded but references. Weights that would have to be are taken to be those of their type.
    """
    models = LoadedModels(settings)
    return plan_job(models, Job(spec or JobSpec(settings), models))


def plan_job(models: LoadedModels, job: Job) -> Plan:
    """The plan of a job on models, which need not be loaded and stay as they are."""
    wanted = [request for request in job.requests if not job.outputs.keeps_existing(request.path)]
    with output_folder(job.outputs.folder) if job.to_files else nullcontext():
        if job.to_files:
            job.outputs.check([request.path for request in wanted])
        absent = models.locate_without_downloads()
        built = models.build(job.size)
        asks = prompt_refiner.is_enabled(job.settings)  # then nobody knows yet how long the texts will be
        requests = check(models, job, wanted, built._replace(text_encoder=None) if asks else built)
    notes = ["the prompts will be refined by a language model first; it has not been asked"] if asks else []
    if job.stop:
        part = " of the first clip" if job.settings.loop > 1 else ""
        notes.append(f"stops after {job.stop} of {job.scheduler.num_steps} steps{part}, to be continued")
    notes += [f"{request.path} exists and is kept" for request in job.requests if request not in wanted]
    notes += [f"{part}: '{getattr(models.settings, part)['from_pretrained']}' would be downloaded" for part in absent]
    notes += [note for request in requests for note in _snapped(job, request)]
    grid = (built.vae.group[0], SPATIAL_FACTOR, SPATIAL_FACTOR)
    estimate = ResourceEstimate(models, built, job, requests, again=len(portions(job, requests)) > 1)
    base = memory_meter.resident_memory() + LIBRARIES
    return Plan(models, job, estimate, estimate.choose(), requests, list(dict.fromkeys(notes)), base, grid)


def describe(clip: ClipConditioning, given: Sequence[str]) -> Iterator[str]:
    """A line for each run of latent frames of a clip that are treated alike; `given` names its references."""

    def kind(frame: int) -> tuple[str, Any, Any]:
        edit, source = clip.edit[frame], clip.sources[frame]
        if source is None:
            return "generated", None, None
        what = "kept" if edit == 0 else "generated, whatever is given" if edit >= 1 else f"edited from {edit:g} on"
        return what, source[0], source[1] - frame

    for (what, reference, shift), run in groupby(range(len(clip.edit)), kind):
        frames = list(run)
        line = f"{_range(frames[0], frames[-1])} {what}"
        if reference is not None:
            of = _range(frames[0] + shift, frames[-1] + shift)
            known = len(given)
            name = given[reference] if reference < known else f"clip {reference - known}"
            line += f": {of} of {name}"
        yield line


def _range(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def _names(request: Request) -> list[str]:
    return request.reference_path.split(";") if request.reference_path else []


def _snapped(job: Job, request: Request) -> Iterator[str]:
    """What is not done as it was asked for, because sizes and starts come in steps."""
    settings, size = job.settings, job.size
    if size.rounding_note:
        yield size.rounding_note
    if settings.image_size is None:
        yield f"{settings.resolution} at {settings.aspect_ratio} is {size.height}x{size.width}"
    resolved = [one for clip in job.timelines[request] for one in clip.placements]
    for asked in parse_mask_strategy(request.mask_strategy):
        for found in [one for one in resolved if _same(asked, one, len(_names(request)))][:1]:
            resolved.remove(found)
            yield from _moved(asked, found, job, request)
    for found in resolved:  # taken over from the clip before
        length = settings.condition_frame_length
        start = len(job.timelines[request][0].edit) - length
        if found.reference_start != start:
            used = f"latent frame {found.reference_start} of the previous clip"
            yield f"clip {found.loop} continues from {used}, not {start}"


def _same(asked: ReferencePlacement, found: ReferencePlacement, count: int) -> bool:
    """Whether `found` may be what became of a placement that names one of `count` references (or an earlier clip)."""
    total = count + asked.loop
    return (asked.loop, asked.reference % max(total, 1), asked.edit) == (found.loop, found.reference, found.edit)


def _moved(asked: ReferencePlacement, found: ReferencePlacement, job: Job, request: Request) -> Iterator[str]:
    frames = len(job.timelines[request][0].edit)
    start = asked.target_start % frames
    if start != found.target_start:
        what = f"target start {start} becomes {found.target_start}"
        yield f"mask_strategy '{asked}': {what}, a multiple of {job.align}"
    if asked.reference_start >= 0 and asked.reference_start != found.reference_start:
        what = f"reference start {asked.reference_start} becomes {found.reference_start}"
        yield f"mask_strategy '{asked}': {what}, a multiple of {job.align}"
    if found.length < asked.length:
        yield f"mask_strategy '{asked}': of {asked.length} latent frames {found.length} fit"


def near_sizes(plan: Plan) -> list[tuple[int, int]]:
    """Sizes (H, W) of about the shape asked for that nothing has to be cut or padded for, in rising order."""
    _, *steps = plan.grid
    height, width = plan.job.size[1:]
    middle = max(round(height / steps[0]), 1)
    found = []
    for rows in range(max(middle - NEAR, 1), middle + NEAR + 1):
        columns = max(round(rows * steps[0] * width / height / steps[1]), 1)
        found.append((rows * steps[0], columns * steps[1]))
    return list(dict.fromkeys(found))


def near_lengths(plan: Plan) -> list[int]:
    """Numbers of frames that the autoencoder takes in whole groups, about the number asked for."""
    group, frames = plan.grid[0], plan.job.size.num_frames
    middle = max(round(frames / group), 1)
    found = [count * group for count in range(max(middle - NEAR, 1), middle + NEAR + 1)]
    return sorted({1, *found})


def cheaper(plan: Plan) -> str | None:
    """The setting nearest to the one asked for that fits, as flags, or None."""
    settings, size = plan.job.settings, plan.job.size
    for other in PLANS[PLANS.index(plan.memory_plan) + 1 :]:
        if plan.room is None or plan.estimate.peak(other) + plan._base <= plan.room:
            return f"--memory {other.name}"
    if plan.room is not None and plan.least > plan.room:
        return None
    fewer: list[tuple[str, dict[str, Any]]] = []  # what is worked on at once, then frames, then pixels
    if "micro_batch_size" in settings.vae or settings.vae["type"] == "OpenSoraVAE_V1_2":
        fewer.append(("--cfg-options vae.micro_batch_size=1", {"vae": {**settings.vae, "micro_batch_size": 1}}))
    lengths = [count for count in reversed(near_lengths(plan)) if 1 < count < size.num_frames and settings.loop == 1]
    shorter = [(f"--num-frames {count}", {"num_frames": count}) for count in lengths]
    smaller, steps = [], plan.grid[1:]
    for part in (0.85, 0.7, 0.5, 0.35, 0.25):
        pair = tuple(max(round(side * part / step), 1) * step for side, step in zip(size[1:], steps, strict=True))
        smaller.append((f"--image-size {pair[0]} {pair[1]}", {"image_size": pair}))
    for trials in (fewer, shorter, smaller):  # each takes less and less: the first that fits is found by halving
        index = bisect_left(trials, True, key=lambda trial: fits_with(plan, trial[1]))
        if index < len(trials):
            return trials[index][0]
    return None


def fits_with(plan: Plan, changes: Mapping[str, Any]) -> bool:
    """Whether the same request with other settings can be made and fits."""
    try:
        other = make_plan(dataclasses.replace(plan.job.settings, **changes))
    except ConfigError:
        return False
    return plan.room is None or other.estimate.peak(other.memory_plan) + plan._base <= plan.room


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[: most - 3] + "...")


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _range_of(spans: Sequence[Span]) -> str:
    least, most = (_time(sum(span[bound] for span in spans)) for bound in (0, 1))
    return least if least == most else f"{least} to {most}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
