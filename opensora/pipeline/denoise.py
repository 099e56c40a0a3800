"""Denoising: a batch of requests whose clips have one shape, step by step, and how requests are put into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from opensora.acceleration.step_cache import cached_sampling
from opensora.acceleration.step_cache.cached_sampling import Cache
from opensora.pipeline import draft
from opensora.pipeline.job import Job
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.mask_strategy import condition_latents
from opensora.pipeline.noise import initial_noise
from opensora.pipeline.request import Request
from opensora.pipeline.text_encoding import Texts
from opensora.schedulers.common import SamplerState

LOOKAHEAD = 8  # batches in which a request may wait for others like it


def batches(job: Job, requests: Sequence[Request], texts: Texts) -> Iterator[list[Request]]:
    """The requests in batches of at most `job.batch_size` that the model can compute as one.

    Requests of a batch have texts of equal lengths, since padding would change the last bits, and agree on which clips
    have given frames. A batch starts with the first request that is left and looks only `LOOKAHEAD` batches ahead, so
    that few results wait for their turn.
    """
    left = list(requests)
    while left:
        window = left[: LOOKAHEAD * job.batch_size if job.batch_size > 1 else 1]
        kind = _kind(job, window[0], texts)
        batch = [one for one in window if _kind(job, one, texts) == kind][: job.batch_size]
        yield batch
        left = [one for one in left if one not in batch]


def _kind(job: Job, request: Request, texts: Texts) -> tuple[Any, ...]:
    """What requests must agree on to be denoised in one batch."""
    shapes = tuple(texts[text].shape for text in job.texts(request))
    return shapes, tuple(any(edit < 1 for edit in clip.edit) for clip in job.timelines[request])


def denoise_clip(
    models: LoadedModels, job: Job, batch: Sequence[Request], loop: int, texts: Texts,
    references: Sequence[Sequence[Tensor]], generators: Sequence[torch.Generator],
) -> Iterator[SamplerState]:  # fmt: skip
    """The sampler's states of clip `loop` of a batch, one after each step; x of the last is [B, C, T, H, W], clean.

    references: the latents [C, T', H, W] that each request is given
    generators: of the random numbers of each request's steps
    A draft that continues starts where it stopped; a new one ends after `job.stop` steps.
    """
    shape = (models.vae.out_channels, *models.vae.get_latent_size(job.size))
    latents, edits = [], []
    for request, given in zip(batch, references, strict=True):
        noise = initial_noise(job.settings.seed, request.sample, loop, shape)
        placed, edit = condition_latents(noise, given, job.timelines[request][loop])
        latents.append(placed)
        edits.append(edit)
    begun = job.drafts.get(batch[0].path) if loop == 0 else None
    resume = draft.resume(begun, generators[0]) if begun else None
    noise, text = torch.stack(latents).to(models.device), torch.cat([texts[job.texts(one)[loop]] for one in batch])
    steps = denoise(models, job, noise, text, texts, edit=torch.stack(edits), source=generators, resume=resume)
    with closing(steps):
        for state in steps:
            yield state
            if state.step == job.stop:
                return


def denoise(
    models: LoadedModels, job: Job, noise: Tensor, text: Tensor, texts: Texts, cache: Cache | None = None,
    **options: Any,
) -> Iterator[SamplerState]:  # fmt: skip
    """The sampler's states from `noise` [B, C, T, H, W] with `text` [B, 1, L, C] or classes [B].

    `texts` holds the negative prompt; `cache` is that of the job by default; `options` are those of the sampler.
    """
    cache = cache or job.cache
    cond, null = {"y": text, **job.conditioning}, None
    if job.scheduler.num_branches == 2:
        uncond = models.model.null_caption(text)
        if job.negative_text is not None:
            uncond = texts[job.negative_text].expand(len(text), -1, -1, -1)
        null = {"y": uncond}
    sequential_cfg = models.plan.sequential_cfg and models.settings.guidance_ranks != "apart"
    options |= {**job.size._asdict(), "sequential_cfg": sequential_cfg, "precompute": True}
    with models.on_device("model"):
        yield from cached_sampling.steps(job.scheduler, models.denoiser, noise, cond, null, cache, **options)


def timesteps(job: Job) -> list[float]:
    """The timestep that the model gets in the first evaluation of each step."""
    found: list[float] = []

    def stand_in(x: Tensor, timestep: Tensor, **_: Any) -> Tensor:
        seen.append(timestep.flatten()[0].item())
        return x.new_zeros(len(x), 2, *x.shape[2:])

    noise, source = torch.zeros(1, 1, 1, 1, 1), [torch.Generator()]
    seen: list[float] = []
    for _ in job.scheduler.steps(stand_in, noise, {}, **job.size._asdict(), source=source, guidance_scale=1.0):
        found.append(seen[0])
        seen.clear()
    return found
