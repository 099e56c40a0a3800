"""Groups requests into batches whose results are bit-identical to those of single requests."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from opensora.pipeline.denoise import conditioning, timesteps
from opensora.pipeline.job import Job
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.noise import initial_noise
from opensora.pipeline.request import Request
from opensora.pipeline.text_encoding import Texts
from opensora.schedulers.guidance import GuidedDenoiser

LOOKAHEAD = 8  # how many batches ahead requests are searched for one that fits

logger = logging.getLogger("opensora")


def batches(models: LoadedModels, job: Job, requests: Sequence[Request], texts: Texts) -> Iterator[list[Request]]:
    """The requests in batches of at most `job.batch_size`, with bit-identical results.

    Requests of a batch have texts of equal lengths, since padding would change the last bits, and the same clips of
    them are conditioned on frames. A batch starts with the first remaining request and looks only `LOOKAHEAD` batches
    ahead, so that few results wait for their turn. Where the device computes a batch with other bits, requests stay
    single.
    """
    remaining, same_bits = list(requests), models.same_bits
    call_key = (job.size, job.scheduler.num_branches, job.negative_text is None, job.settings.multi_resolution)
    while remaining:
        window = remaining[: LOOKAHEAD * job.batch_size if job.batch_size > 1 else 1]
        batch_key = _batch_key(job, window[0], texts)
        batch = [request for request in window if _batch_key(job, request, texts) == batch_key][: job.batch_size]
        remaining = [request for request in remaining if request not in batch]
        key = (call_key, batch_key, len(batch))
        if len(batch) > 1 and key not in same_bits:
            same_bits[key] = is_batch_invariant(models, job, batch, texts)
            if not same_bits[key]:
                note = "batch size %d would change the last bits on this device; running %d requests one at a time"
                logger.info(note, job.batch_size, len(batch))
        yield from [batch] if same_bits.get(key, True) else ([request] for request in batch)


def _batch_key(job: Job, request: Request, texts: Texts) -> tuple[tuple[torch.Size, bool], ...]:
    """Equal for requests that can share a batch: for each clip, its text's shape and whether it has frames to keep."""
    conditioned = (any(edit < 1 for edit in clip.edit) for clip in job.timelines[request])
    return tuple(
        (texts[text].shape, has_frames) for text, has_frames in zip(job.texts(request), conditioned, strict=True)
    )


@torch.inference_mode()
def is_batch_invariant(models: LoadedModels, job: Job, batch: Sequence[Request], texts: Texts) -> bool:
    """Whether the model computes each row of a batch with the same bits as that row alone.

    Kernels are chosen by shapes, not by values, so one evaluation decides. It costs two steps of the batch.
    """
    shape = (models.vae.out_channels, *models.vae.get_latent_size(job.size))
    x = torch.stack([initial_noise(job.settings.seed, row, 0, shape) for row in range(len(batch))]).to(models.device)
    times = timesteps(job)
    timestep = torch.tensor([times[len(times) // 2]], device=models.device)
    masks: dict[str, Any] = {}
    clips = _batch_key(job, batch[0], texts)
    with models.on_device("model"):
        for loop, (_, has_frames) in enumerate(clips):
            if clips.index(clips[loop]) < loop:
                continue
            if has_frames:
                masks["x_mask"] = torch.arange(shape[1], device=models.device).expand(len(batch), -1) > 0
            text = torch.cat([texts[job.texts(request)[loop]] for request in batch])

            def predict(rows: slice, text: torch.Tensor = text, has_frames: bool = has_frames) -> torch.Tensor:
                cond, null = conditioning(models, job, text[rows], texts)
                channels = job.scheduler.guided_channels(len(x[0]))
                options = {"sequential": models.sequential_cfg, "precompute": True}
                denoiser = GuidedDenoiser(models.denoiser, cond, null, job.scheduler.cfg_scale, channels, **options)
                return denoiser(x[rows], timestep, **{n: mask[rows] for n, mask in masks.items() if has_frames})

            together = predict(slice(None))
            if not all(torch.equal(together[row], predict(slice(row, row + 1))[0]) for row in range(len(batch))):
                return False
    return True
