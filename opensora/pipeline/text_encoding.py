"""Encodes prompts: token counts, encoding, and the split of requests into portions whose texts fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from opensora.models.text_encoder.classes import ClassIds
from opensora.models.text_encoder.t5 import T5Encoder
from opensora.pipeline.job import Job
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.request import Request

HELD_TEXTS = 256  # encoded texts in memory at once; T5-XXL: up to 2.5 MB each

Texts = dict[str, Tensor]  # text -> features [1, 1, L, C] at its real length, or a class [1]


def encode_texts(models: LoadedModels, job: Job, texts: Sequence[str]) -> Texts:
    """The conditioning of each text and of the job's negative prompt, on the device of the models."""
    encoder = models.load_text_encoder()
    unique = list(dict.fromkeys(texts if job.negative_text is None else [*texts, job.negative_text]))
    each = isinstance(encoder, T5Encoder)
    values = encoder.encode_each(unique) if each else [encoder.encode([text])[0] for text in unique]
    on_device = (value.to(models.device) for value in values)
    return {
        text: value.to(models.dtype) if value.is_floating_point() else value
        for text, value in zip(unique, on_device, strict=True)
    }


def portions(job: Job, requests: Sequence[Request]) -> list[list[Request]]:
    """The requests in order, in lists of at most `HELD_TEXTS` texts each, or of one request."""
    result: list[list[Request]] = []
    held: set[str] = set()
    for one in requests:
        texts = set(job.texts(one))
        if not result or len(held | texts) > HELD_TEXTS:
            result.append([])
            held = set()
        result[-1].append(one)
        held |= texts
    return result


def count_tokens(encoder: Any, text: str) -> int:
    """The number of tokens of a text; needs no weights. Raises ConfigError for a text that is not a class."""
    if isinstance(encoder, T5Encoder):
        return min(len(encoder.tokenizer.encode(text)), encoder.model_max_length)
    if isinstance(encoder, ClassIds):
        encoder.encode([text])
    return 1
