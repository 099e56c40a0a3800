"""What is not done as it was asked for, because sizes and starts come in steps: notes of a plan."""

from __future__ import annotations

from collections.abc import Iterator

from opensora.pipeline.job import Job
from opensora.pipeline.mask_strategy import ReferencePlacement, parse_mask_strategy
from opensora.pipeline.request import Request


def adjustments(job: Job, request: Request) -> Iterator[str]:
    """What is not done as it was asked for, because sizes and starts come in steps."""
    settings, size = job.settings, job.size
    if size.rounding_note:
        yield size.rounding_note
    if settings.image_size is None:
        yield f"{settings.resolution} at {settings.aspect_ratio} is {size.height}x{size.width}"
    resolved = [one for clip in job.timelines[request] for one in clip.placements]
    for asked in parse_mask_strategy(request.mask_strategy):
        for found in [one for one in resolved if _same(asked, one, len(request.reference_paths))][:1]:
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
