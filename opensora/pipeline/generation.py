"""From checked requests to frames, in numbered steps: build, plan memory, encode prompts, load, denoise, decode."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from opensora.acceleration.device import synchronize
from opensora.acceleration.memory_plan import PLANS
from opensora.checkpoints import builder
from opensora.distributed.collectives import broadcast_object
from opensora.pipeline import draft, prompt_refiner, step_cache
from opensora.pipeline.adapter_uses import adapter_uses
from opensora.pipeline.adapters import check_adapters
from opensora.pipeline.batching import batches
from opensora.pipeline.calibrated_cache import calibrated_cache
from opensora.pipeline.checks import check_inputs, check_text_lengths, memory_advice, warn_untrained
from opensora.pipeline.conditioning import place_media
from opensora.pipeline.decode import decode, encode
from opensora.pipeline.denoise import denoise_clip
from opensora.pipeline.job import Job
from opensora.pipeline.loaded_models import Components, LoadedModels
from opensora.pipeline.noise import noise_generator
from opensora.pipeline.request import Request
from opensora.pipeline.stage_costs import ResourceEstimate, record_speed
from opensora.pipeline.text_encoding import Texts, encode_texts, portions
from opensora.schedulers.common import SamplerState

logger = logging.getLogger("opensora")


class StepEnd(NamedTuple):
    """A step of the sampler on clip `loop` of a batch; `generators` draw the noise of its next steps, one a request."""

    batch: list[Request]
    loop: int
    state: SamplerState
    generators: list[torch.Generator]


class Result(NamedTuple):
    """The result of a request: frames uint8 [T, H, W, 3] (empty except on the main rank).

    `latents` [C, T', H', W'] are those of its last clip. A draft has the `state` and `generator` to continue with.
    """

    request: Request
    frames: np.ndarray
    latents: Tensor
    state: SamplerState | None = None
    generator: Tensor | None = None


def generate(
    models: LoadedModels, job: Job, requests: Sequence[Request], *, with_frames: bool = True, progress: bool = False,
    keep_loaded: bool = False,
) -> Iterator[StepEnd | Result]:  # fmt: skip
    """Yields every step of the sampler, and every result as soon as it is finished, in the order of the requests.

    Without `with_frames` results have only latents. `keep_loaded` keeps the text encoder for later requests where
    memory suffices. `progress` shows a bar. Raises ConfigError, MediaError or WeightsError.
    """
    # 1. Locate and build the models; check the requests
    models.locate()
    requests = check_requests(models, job, refine(models, job, requests), models.build(job.size))

    # 2. Choose the memory plan
    keeps_text_encoder = choose_memory_plan(models, job, requests, models.build(job.size), keep_loaded)
    if job.size.rounding_note:
        logger.info("%s", job.size.rounding_note)

    # 3. Encode the prompts, then read the weights of autoencoder and diffusion model
    first, *others = portions(job, requests)
    texts = encode_texts(models, job, [*job.texts_of(first), *step_cache.calibration_prompts(job.settings)])
    if not keeps_text_encoder:
        models.drop_text_encoder()
    models.load(job.size)
    models.use_adapters(job.settings)
    warn_untrained(job.size, builder.trained_sizes(models.path("model")))
    latent_shape = (models.vae.out_channels, *models.vae.get_latent_size(job.size))
    _check_drafts(models, job, requests, latent_shape)
    job.cache = calibrated_cache(models, job, latent_shape, texts)
    if job.stop:
        logger.info("drafts stop after %d of %d steps", job.stop, job.scheduler.num_steps)

    # 4. Denoise and decode, batch by batch
    yield from _generate_portion(models, job, first, texts, with_frames, progress)
    for portion in others:
        texts.clear()
        texts = encode_texts(models, job, job.texts_of(portion))
        if not keeps_text_encoder:
            models.drop_text_encoder()
        yield from _generate_portion(models, job, portion, texts, with_frames, progress)
    record_speed(models, job, texts, len(requests) * job.settings.loop)


def refine(models: LoadedModels, job: Job, requests: Sequence[Request]) -> list[Request]:
    """The requests with their texts rewritten by a language model, if the settings say so; each text is sent once."""
    if prompt_refiner.is_enabled(job.settings):
        where, texts = prompt_refiner.endpoint(job.settings), [text for one in requests for text in one.texts]
        answers = prompt_refiner.refine_texts(texts, where) if models.layout.is_main else {}
        job.use_refined(broadcast_object(answers, models.layout), llm_model=where[1])
    return [one.refined(job.settings) for one in requests] if job.settings.refined else list(requests)


def check_requests(models: LoadedModels, job: Job, requests: Sequence[Request], built: Components) -> list[Request]:
    """Places the references of the requests, and checks all that can be checked without weights.

    Raises ConfigError or MediaError.
    """
    requests = place_media(job, requests, built.model, built.vae)
    check_text_lengths(job, requests, built)
    check_inputs(job, built)
    if models.model is None:  # else they are checked when they are put in place
        check_adapters(built.model, adapter_uses(job.settings.lora))
    return requests


def choose_memory_plan(
    models: LoadedModels, job: Job, requests: Sequence[Request], built: Components, keep_loaded: bool = False
) -> bool:
    """Applies the memory plan of the settings or one that fits; returns whether the text encoder may stay loaded.

    Models that are already loaded change only to a plan that takes less memory.
    """
    reloads_text_encoder = keep_loaded or len(portions(job, requests)) > 1
    estimate = ResourceEstimate(models, built, job, requests, reloads_text_encoder)
    loaded = estimate.weights() if models.model is not None else 0
    plans = PLANS[PLANS.index(models.plan) :] if loaded else PLANS
    models.use_plan(broadcast_object(estimate.choose(loaded, plans), models.layout))
    return keep_loaded and broadcast_object(estimate.fits(models.plan, loaded), models.layout)


def _check_drafts(models: LoadedModels, job: Job, requests: Sequence[Request], latent_shape: tuple[int, ...]) -> None:
    """Raises ConfigError or WeightsError for a draft that was made with other settings, models or references."""
    for request in requests:
        if stopped := job.drafts.get(request.path):
            draft.check_sampler(stopped, job.scheduler.num_steps, latent_shape)
            draft.check_unchanged(stopped, job.recipe(request, models))


def _generate_portion(
    models: LoadedModels, job: Job, requests: Sequence[Request], texts: Texts, with_frames: bool, progress: bool
) -> Iterator[StepEnd | Result]:
    """Yields every step, and the results in the order of the requests: early results wait."""
    finished: dict[Request, Result] = {}
    order = iter(requests)
    expected = next(order, None)
    with memory_advice(job.size, models.plan):
        for batch in batches(models, job, requests, texts):
            for event in generate_batch(models, job, batch, texts, with_frames, progress):
                if isinstance(event, StepEnd):
                    yield event
                    continue
                if job.settings.cache_psnr and not job.cache.is_exact:
                    _log_psnr(models, job, event, texts)
                finished[event.request] = event
                while expected in finished:
                    yield finished.pop(expected)
                    expected = next(order, None)


@torch.inference_mode()  # cheaper for small operations than no_grad
def generate_batch(
    models: LoadedModels, job: Job, batch: list[Request], texts: Texts, with_frames: bool = True, progress: bool = False
) -> Iterator[StepEnd | Result]:
    """Yields the steps and results of one batch: clip after clip, each continuing the previous one.

    A draft ends within the first clip.
    """
    references = [[encode(models, one) for one in job.references.read(request.reference_path)] for request in batch]
    frames: list[list[np.ndarray]] = [[] for _ in batch]
    for loop in range(job.settings.loop):
        generators = [noise_generator(request.seed, request.sample, loop) for request in batch]
        states = denoise_clip(models, job, batch, loop, texts, references, generators)
        for state in _with_progress(job.timed_steps("sampling", states), progress and models.layout.is_main):
            yield StepEnd(batch, loop, state, generators)
        with job.timed("sampling"):
            synchronize(models.device)
        latents = state.x if state.step == state.num_steps else state.x0
        continues = loop + 1 < job.settings.loop and not job.stop
        for row in range(len(batch)):
            clip = None
            if with_frames and models.layout.is_main:
                with job.timed("decoding"):
                    clip = decode(models, job, latents[row : row + 1], keep_video=continues)
                    synchronize(models.device)
                frames[row].append(clip.frames[job.overlap if loop else 0 :])
            if continues:
                latent = torch.empty(0) if clip is None or clip.video is None else encode(models, clip.video)
                references[row].append(broadcast_object(latent, models.layout))
        if not continues:
            break
    for row, request in enumerate(batch):
        joined = frames[row][0] if len(frames[row]) == 1 else np.concatenate(frames[row] or [np.empty(0, np.uint8)])
        stopped = (state, generators[row].get_state()) if job.stop else ()
        yield Result(request, joined, latents[row], *stopped)


def _log_psnr(models: LoadedModels, job: Job, result: Result, texts: Texts) -> None:
    """Generates a result again without approximations and logs the PSNR between the two."""
    with job.without_approximations():
        events = generate_batch(models, job, [result.request], texts)
        [exact] = [event for event in events if isinstance(event, Result)]
    if models.layout.is_main:
        logger.info("PSNR against the uncached run: %.1f dB", step_cache.psnr(result.frames, exact.frames))


def _with_progress(states: Iterator[SamplerState], shown: bool) -> Iterator[SamplerState]:
    """The states, counted by a progress bar if it is `shown`."""
    with tqdm(desc="sampling", unit="step", disable=not shown) as bar:
        for state in states:
            if bar.total is None:
                bar.total, bar.initial, bar.n = state.num_steps, state.step - 1, state.step - 1
            bar.update()
            yield state
