"""Denoising of a batch of requests whose clips have one shape, step by step."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from opensora.acceleration.step_cache import cached_sampling
from opensora.acceleration.step_cache.cached_sampling import Cache
from opensora.pipeline import draft
from opensora.pipeline.job import Job
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.noise import condition_latents, initial_noise
from opensora.pipeline.request import Request
from opensora.pipeline.text_encoding import Texts
from opensora.schedulers.common import SamplerState


def denoise_clip(
    models: LoadedModels, job: Job, batch: Sequence[Request], loop: int, texts: Texts,
    references: Sequence[Sequence[Tensor]], generators: Sequence[torch.Generator],
) -> Iterator[SamplerState]:  # fmt: skip
    """The sampler's states of clip `loop` of a batch, one after each step; x of the last is [B, C, T, H, W], clean.

    references: for each request, the latents [C, T', H, W] of its reference images and videos
    generators: one per request, for the noise of its steps
    A draft that is continued starts where it stopped; a new draft ends after `job.stop` steps.
    """
    shape = (models.vae.out_channels, *models.vae.get_latent_size(job.size))
    latents, edits = [], []
    for request, encoded in zip(batch, references, strict=True):
        noise = initial_noise(request.seed, request.sample, loop, shape)
        placed, edit = condition_latents(noise, encoded, job.timelines[request][loop])
        latents.append(placed)
        edits.append(edit)
    stopped = job.drafts.get(batch[0].path) if loop == 0 else None
    resume = draft.resume(stopped, generators[0]) if stopped else None
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
) -> Generator[SamplerState, None, None]:  # fmt: skip
    """The sampler's states from `noise` [B, C, T, H, W] with `text` [B, 1, L, C] or classes [B].

    `texts` holds the negative prompt; `cache` is that of the job by default; `options` are those of the sampler.
    """
    cache = cache or job.cache
    cond, null = conditioning(models, job, text, texts)
    options |= {**job.size._asdict(), "sequential_cfg": models.sequential_cfg, "precompute": True}
    with models.on_device("model"):
        yield from cached_sampling.steps(job.scheduler, models.denoiser, noise, cond, null, cache, **options)


def conditioning(
    models: LoadedModels, job: Job, text: Tensor, texts: Texts
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The conditioning of texts, and the entries that replace it in the unconditional branch (None: no guidance)."""
    cond = {"y": text, **job.conditioning}
    if job.scheduler.num_branches == 1:
        return cond, None
    if job.negative_text is None:
        return cond, {"y": models.model.null_caption(text)}
    return cond, {"y": texts[job.negative_text].expand(len(text), -1, -1, -1)}


def timesteps(job: Job) -> list[float]:
    """The timestep of each step."""
    return job.scheduler.timesteps(**job.size._asdict())
