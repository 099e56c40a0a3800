"""The notes of a plan on sizes and placements that are rounded."""

from __future__ import annotations

from collections.abc import Iterator

from opensora.pipeline.job import Job
from opensora.pipeline.mask_strategy import ReferencePlacement, parse_mask_strategy
from opensora.pipeline.request import Request


def adjustments(job: Job, request: Request) -> Iterator[str]:
    """Notes on sizes and placements that are rounded or cut."""
    settings, size = job.settings, job.size
    if size.rounding_note:
        yield size.rounding_note
    if settings.image_size is None:
        yield f"{settings.resolution} at {settings.aspect_ratio} is {size.height}x{size.width}"
    resolved = [placement for clip in job.timelines[request] for placement in clip.placements]
    for asked in parse_mask_strategy(request.mask_strategy):
        for found in [
            placement for placement in resolved if _may_be_resolved(asked, placement, len(request.reference_paths))
        ][:1]:
            resolved.remove(found)
            yield from _placement_notes(asked, found, job, request)
    for found in resolved:  # the placements that continue the previous clip
        length = settings.condition_frame_length
        start = len(job.timelines[request][0].edit) - length
        if found.reference_start != start:
            used = f"latent frame {found.reference_start} of the previous clip"
            yield f"clip {found.loop} continues from {used}, not {start}"


def _may_be_resolved(asked: ReferencePlacement, found: ReferencePlacement, count: int) -> bool:
    """Whether `found` may be the resolved form of `asked`, in a prompt of `count` references."""
    total = count + asked.loop
    return (asked.loop, asked.reference % max(total, 1), asked.edit) == (found.loop, found.reference, found.edit)


def _placement_notes(asked: ReferencePlacement, found: ReferencePlacement, job: Job, request: Request) -> Iterator[str]:
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
