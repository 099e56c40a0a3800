"""Conditioning images and videos: places references in the clips of each request, and joins clips."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError
from opensora.pipeline import media_conditions
from opensora.pipeline.job import Job
from opensora.pipeline.mask_strategy import parse_mask_strategy, timeline
from opensora.pipeline.request import Request

logger = logging.getLogger("opensora")


def place_media(job: Job, requests: Sequence[Request], model: Any, vae: Any) -> list[Request]:
    """The requests with their references and mask strategies; sets `job.timelines`.

    Raises ConfigError for media that do not fit the clips.
    """
    requests = _with_references(job, requests, vae)
    settings, frames = job.settings, vae.get_latent_size(job.size)[0]
    job.overlap = overlapping_frames(vae, job.size.num_frames, settings) if settings.loop > 1 else 0
    continuation = (settings.condition_frame_length, settings.condition_frame_edit)
    for request in requests:
        if request.reference_path not in job.reference_hashes:
            job.reference_hashes[request.reference_path] = job.references.hashes(request.reference_path)
        counts = job.references.counts(request.reference_path)
        counts = [vae.get_latent_size((count, None, None))[0] for count in counts]
        placements = parse_mask_strategy(request.mask_strategy)
        job.timelines[request] = timeline(placements, counts, frames, settings.loop, job.align, continuation)
        if (placements or settings.loop > 1) and model.patch_size[0] > 1:
            raise ConfigError(f"model '{settings.model['type']}' embeds frames in pairs and cannot keep single frames")
        if counts and not placements:
            logger.warning("references without a mask_strategy are ignored: %s", request.reference_path)
    return requests


def _with_references(job: Job, requests: Sequence[Request], vae: Any) -> list[Request]:
    """The requests with `image`, `last_frame`, `extend` and `edit` as references and a mask strategy."""
    settings = job.settings
    if not media_conditions.media_paths(settings):
        return list(requests)
    if conflicting := [request.prompt for request in requests if request.reference_path or request.mask_strategy]:
        names = ", ".join(media_conditions.NAMES)
        raise ConfigError(f"prompt {conflicting[0]!r} brings its own references; remove {names}")
    latent_frames = vae.get_latent_size(job.size)[0]
    converted = media_conditions.reference_settings(settings, job.size.num_frames, latent_frames, vae.group)
    job.align = converted.align
    job.references.check(converted.reference_path)
    paths, strategy = converted.reference_path, converted.mask_strategy
    return [request._replace(reference_path=paths, mask_strategy=strategy) for request in requests]


def overlapping_frames(vae: Any, num_frames: int, settings: InferenceSettings) -> int:
    """The number of frames that a clip repeats from the end of the previous clip (the overlap).

    Raises ConfigError where clips cannot be joined; it names the nearest setting that works.
    """
    length = settings.condition_frame_length
    if problem := _join_problem(vae, num_frames, length):
        raise ConfigError(f"loop {settings.loop}: {problem}; {_join_remedy(vae, num_frames, length)}")
    return vae.get_pixel_frames(length)


def _join_problem(vae: Any, num_frames: int, length: int) -> str:
    """Why a clip of `num_frames` cannot continue from the last `length` latent frames of another; empty if it can."""
    latent_frames = vae.get_latent_size((num_frames, None, None))[0]
    if not 0 < length < latent_frames:
        clip = f"clips of {num_frames} frames have {latent_frames} latent frames"
        return f"condition_frame_length is {length}, but {clip}"
    try:
        vae.get_pixel_frames(latent_frames)
        vae.get_pixel_frames(length)
    except ValueError as error:
        return f"{num_frames} frames with condition_frame_length {length}: {error}"
    return ""


def _join_remedy(vae: Any, num_frames: int, length: int) -> str:
    """The setting that joins clips: another overlap, else the nearest number of frames, else both."""
    group, latents = vae.group
    lengths = sorted(range(1, vae.get_latent_size((num_frames, None, None))[0]), key=lambda count: abs(count - length))
    if fitting := next((count for count in lengths if not _join_problem(vae, num_frames, count)), None):
        return f"give --condition-frame-length {fitting}"
    limit = max(num_frames, min(length, 10**4) * group // latents) + 2 * group
    counts = sorted(range(1, limit + 1), key=lambda count: abs(count - num_frames))
    if fitting := next((count for count in counts if not _join_problem(vae, count, length)), None):
        return f"give --num-frames {fitting}"
    if fitting := next((count for count in counts if not _join_problem(vae, count, latents)), None):
        return f"give --num-frames {fitting} --condition-frame-length {latents}"
    return "give an autoencoder with vae.micro_frame_size: without, it joins no clips"
