"""Parts of a plan in words: the frames of each clip, and the memory and time of each stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from opensora.pipeline.job import Job
from opensora.pipeline.mask_strategy import ClipConditioning
from opensora.pipeline.request import Request
from opensora.pipeline.stage_costs import Stage
from opensora.profiling.speed_history import Span

GIB = 2**30


def clips(job: Job, requests: Sequence[Request], num_frames: int) -> Iterator[str]:
    """What each request generates, `num_frames` frames in all, and the conditioning of its clips."""
    height, width = job.frame_size
    kind = "image" if num_frames == 1 else f"{num_frames} frames at {job.settings.output_fps:g} fps"
    for request in requests:
        yield f"{request.path}: {kind}, {height}x{width}, from {_short(request.prompt)}"
        timeline = job.timelines[request]
        if len(timeline) > 1:
            joined = f"{len(timeline)} clips of {job.size.num_frames} frames, each taking over {job.overlap}"
            yield f"  {joined} from the one before"
        for loop, clip in enumerate(timeline):
            yield f"  clip {loop}: {len(clip.edit)} latent frames"
            yield from (f"    {line}" for line in _describe(clip, request.reference_paths))


def costs(stages: Sequence[Stage], spans: Sequence[Span]) -> Iterator[str]:
    """A table of the stages."""
    yield f"{'stage':<12}{'weights':>10}{'work':>10}{'time':>20}"
    for stage, span in zip(stages, spans, strict=True):
        yield f"{stage.name:<12}{gib(stage.weights):>10}{gib(stage.cost.peak):>10}{duration([span]):>20}"


def _describe(clip: ClipConditioning, references: Sequence[str]) -> Iterator[str]:
    """One line for each range of latent frames with the same treatment; `references` are their names."""

    def kind(frame: int) -> tuple[str, Any, Any]:
        edit, source = clip.edit[frame], clip.sources[frame]
        if source is None:
            return "generated", None, None
        what = "kept" if edit == 0 else "generated, whatever is given" if edit >= 1 else f"edited from {edit:g} on"
        return what, source[0], source[1] - frame

    for (what, reference, shift), run in groupby(range(len(clip.edit)), kind):
        frames = list(run)
        line = f"{_frames(frames[0], frames[-1])} {what}"
        if reference is not None:
            source_frames = _frames(frames[0] + shift, frames[-1] + shift)
            num_references = len(references)
            name = references[reference] if reference < num_references else f"clip {reference - num_references}"
            line += f": {source_frames} of {name}"
        yield line


def _frames(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[: most - 3] + "...")


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f} GiB"


def duration(spans: Sequence[Span]) -> str:
    """The sum of the times, from best to worst."""
    least, most = _time(sum(span.least for span in spans)), _time(sum(span.most for span in spans))
    return least if least == most else f"{least} to {most}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
