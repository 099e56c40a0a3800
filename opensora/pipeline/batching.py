"""Which requests are denoised together: those whose bits do not depend on it."""

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

LOOKAHEAD = 8  # batches in which a request may wait for others like it

logger = logging.getLogger("opensora")


def batches(models: LoadedModels, job: Job, requests: Sequence[Request], texts: Texts) -> Iterator[list[Request]]:
    """The requests in batches of at most `job.batch_size`, each of which gives the bits of single requests.

    Requests of a batch have texts of equal lengths, since padding would change the last bits, and agree on which clips
    have given frames. A batch starts with the first request that is left and looks only `LOOKAHEAD` batches ahead, so
    that few results wait for their turn. Requests are left single where the device computes a batch with other bits.
    """
    left, same_bits = list(requests), {}
    while left:
        window = left[: LOOKAHEAD * job.batch_size if job.batch_size > 1 else 1]
        kind = _kind(job, window[0], texts)
        batch = [one for one in window if _kind(job, one, texts) == kind][: job.batch_size]
        left = [one for one in left if one not in batch]
        key = (kind, len(batch))
        if len(batch) > 1 and key not in same_bits:
            same_bits[key] = is_batch_invariant(models, job, batch, texts)
            if not same_bits[key]:
                note = "batch size %d would change the last bits on this device; running %d requests one at a time"
                logger.info(note, job.batch_size, len(batch))
        yield from [batch] if same_bits.get(key, True) else ([one] for one in batch)


def _kind(job: Job, request: Request, texts: Texts) -> tuple[tuple[torch.Size, bool], ...]:
    """What requests must agree on to be denoised in one batch: for each clip, its text and whether frames are given."""
    given = (any(edit < 1 for edit in clip.edit) for clip in job.timelines[request])
    return tuple((texts[text].shape, one) for text, one in zip(job.texts(request), given, strict=True))


@torch.inference_mode()
def is_batch_invariant(models: LoadedModels, job: Job, batch: Sequence[Request], texts: Texts) -> bool:
    """Whether one evaluation of the model gives each row of a batch the bits that it gives the row alone.

    Kernels are chosen by shapes, not by values, so that one evaluation speaks for all. It costs two steps of the batch.
    """
    shape = (models.vae.out_channels, *models.vae.get_latent_size(job.size))
    x = torch.stack([initial_noise(job.settings.seed, row, 0, shape) for row in range(len(batch))]).to(models.device)
    times = timesteps(job)
    timestep = torch.tensor([times[len(times) // 2]], device=models.device)
    masks: dict[str, Any] = {}
    kinds = _kind(job, batch[0], texts)
    with models.on_device("model"):
        for loop, (_, given) in enumerate(kinds):
            if kinds.index(kinds[loop]) < loop:
                continue
            if given:
                masks["x_mask"] = torch.arange(shape[1], device=models.device).expand(len(batch), -1) > 0
            text = torch.cat([texts[job.texts(one)[loop]] for one in batch])

            def predict(rows: slice, text: torch.Tensor = text, given: bool = given) -> torch.Tensor:
                cond, null = conditioning(models, job, text[rows], texts)
                channels = job.scheduler.guided_channels(len(x[0]))
                options = {"sequential": models.sequential_cfg, "precompute": True}
                denoiser = GuidedDenoiser(models.denoiser, cond, null, job.scheduler.cfg_scale, channels, **options)
                return denoiser(x[rows], timestep, **{n: mask[rows] for n, mask in masks.items() if given})

            together = predict(slice(None))
            if not all(torch.equal(together[row], predict(slice(row, row + 1))[0]) for row in range(len(batch))):
                return False
    return True
