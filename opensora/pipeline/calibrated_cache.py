"""The step cache "auto": calibrated on a few prompts, or loaded from an earlier calibration."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from opensora.acceleration.step_cache import cached_sampling, calibration, calibration_store
from opensora.acceleration.step_cache.cached_sampling import Cache, Observe
from opensora.acceleration.step_cache.table import CacheTable
from opensora.distributed.collectives import broadcast_object
from opensora.pipeline import step_cache
from opensora.pipeline.denoise import denoise
from opensora.pipeline.job import Job
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.noise import initial_noise, noise_generator
from opensora.pipeline.text_encoding import Texts

logger = logging.getLogger("opensora")


@torch.no_grad()
def calibrated_cache(models: LoadedModels, job: Job, latent_shape: tuple[int, ...], texts: Texts) -> Cache:
    """The step cache of a job on loaded models: that of its settings, or for "auto" the calibrated one.

    `texts` holds the prompts of `step_cache.calibration_prompts`.
    """
    settings, scheduler = job.settings, job.scheduler
    if settings.cache != "auto" or settings.max_error == 0:
        return job.cache
    prompts, interval = step_cache.calibration_prompts(settings), settings.guidance_interval
    adapters = {"lora": [settings.lora, models.adapters.hashes]} if models.adapters.hashes else {}
    negative = {} if job.negative_text is None else {"negative": job.negative_text}
    key = calibration_store.key_of(
        weights=models.summaries["model"].sha256, scheduler=settings.scheduler, shape=latent_shape, size=job.size,
        dtype=models.dtype, fps=settings.fps, prompts=prompts, max_error=settings.max_error, interval=interval,
        linear=settings.linear, **negative, **adapters,
    )  # fmt: skip
    calibrated = broadcast_object(calibration_store.load(key) if models.layout.is_main else None, models.layout)
    if calibrated is None:
        logger.info("step cache: calibrating on %d prompts; later runs of this model and size reuse it", len(prompts))

        def run(number: int, cache: Cache, observe: Observe | None) -> Tensor:
            noise = initial_noise(settings.seed, -1 - number, 0, latent_shape)[None].to(models.device)
            source, text = [noise_generator(settings.seed, -1 - number, 0)], texts[prompts[number]]
            *_, last = denoise(models, job, noise, text, texts, cache, observe=observe, source=source)
            return last.x

        effects = cached_sampling.effects(scheduler, latent_shape[0], job.size._asdict())
        calibrated = calibration.calibrate(
            run, effects, scheduler.cfg_scale, len(prompts), settings.max_error, interval
        )
        calibrated = broadcast_object(calibrated, models.layout)
        if models.layout.is_main:
            calibration_store.save(key, calibrated)
    if calibrated.table is None:
        logger.info("step cache: no evaluation can be skipped within an error of %g", settings.max_error)
        return Cache(interval=interval)
    total, worst = _evaluated_branches(calibrated.table, job), max(calibrated.errors)
    text = "step cache: computes %d of %d guidance branches; largest error in calibration %.4f"
    logger.info(text, calibrated.table.cost, total, worst)
    return Cache("table", calibrated.table, interval=interval)


def _evaluated_branches(table: CacheTable, job: Job) -> int:
    """The guidance branches that a run without a table evaluates."""
    count, (first, end) = len(table.branches), job.settings.guidance_interval or (0.0, 1.0)
    return count + (job.scheduler.num_branches - 1) * sum(first <= k / count < end for k in range(count))
