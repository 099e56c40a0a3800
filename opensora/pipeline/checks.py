"""Checks of a job after the models are built and before weights are read; warnings and advice."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from opensora.acceleration.memory_plan import LOW, MemoryPlan
from opensora.errors import ConfigError
from opensora.models.sizes import conditioning_kind
from opensora.pipeline.job import Job
from opensora.pipeline.loaded_models import Components
from opensora.pipeline.noise import noise_generator
from opensora.pipeline.request import Request, Size
from opensora.pipeline.text_encoding import count_tokens

logger = logging.getLogger("opensora")


def check_text_lengths(job: Job, requests: Sequence[Request], components: Components) -> None:
    """Raises ConfigError for a text of more tokens than the model takes. Does nothing without a text encoder."""
    encoder, config = components.text_encoder, components.model.config
    if encoder is None:
        return
    for text in job.texts_of(requests):
        _check_length(count_tokens(encoder, text), config)
    if job.negative_text is not None:
        _check_length(count_tokens(encoder, job.negative_text), config, "negative_prompt")


def check_inputs(job: Job, components: Components) -> None:
    """Raises ConfigError where the sampler or the size conditioning does not fit the model."""
    model, name = components.model, job.settings.model["type"]
    if missing := set(model.size_arguments) - job.conditioning.keys():
        problem = f"{type(model).__name__} needs {', '.join(model.size_arguments)}, but has no {', '.join(missing)}"
        kind = conditioning_kind(name)
        raise ConfigError(f"model '{name}': {problem}; set multi_resolution='{kind}', or remove it")

    def dummy_model(x: Tensor, timestep: Tensor, **_: Any) -> Tensor:
        return x.new_zeros(len(x), model.out_channels, *x.shape[2:])

    noise, source = torch.zeros(1, model.in_channels, 1, 1, 1), [noise_generator(job.settings.seed, 0, 0)]
    try:
        steps = job.scheduler.steps(dummy_model, noise, {}, **job.size._asdict(), source=source, guidance_scale=1.0)
        list(islice(steps, 2))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"scheduler '{job.settings.section('scheduler')['type']}': {error}") from error


def _check_length(tokens: int, config: dict[str, Any], what: str = "a prompt") -> None:
    limit = config["model_max_length"]
    if tokens > limit:
        remedy = f"shorten it, or cut it with --cfg-options text_encoder.model_max_length={limit}"
        raise ConfigError(f"{what} has {tokens} tokens, but the model takes {limit}; {remedy}")


def warn_untrained(size: Size, trained: list[list[int]]) -> None:
    """Warns if the checkpoint lists the sizes that it was trained on, and `size` is not among them."""
    known = list(dict.fromkeys(Size(*one).rounded for one in trained))
    if known and size.rounded not in known:
        listed = ", ".join(map(str, known))
        logger.warning("this model was trained on %s: expect noise at %s", listed, size.rounded)


@contextmanager
def memory_advice(size: Size, plan: MemoryPlan) -> Iterator[None]:
    """Turns an out-of-memory error in the block into a ConfigError with a remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        remedy = "use a smaller size or fewer frames" + ("" if plan == LOW else ", but first try --memory low")
        raise ConfigError(f"memory does not suffice for {size}; {remedy}") from error
