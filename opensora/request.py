"""What is asked for, checked before any work: the size, and one request for each result."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from opensora import prompts, refine, registry
from opensora.datasets.aspect import get_image_size, get_num_frames
from opensora.errors import ConfigError
from opensora.settings import InferenceSettings

logger = logging.getLogger("opensora")

SPATIAL_FACTOR = 8
PARTS = ("text_encoder", "vae", "model")  # in the order in which they are read
# Settings of the documents that this version cannot follow; their defaults ask for nothing.
NOT_YET = ("prompt_generator",)


class Request(NamedTuple):
    """One result to make: the prompt as given and as encoded, which of its samples, where it goes, what is given."""

    prompt: str
    encoded: str
    sample: int
    path: str  # without suffix
    reference_path: str | None = None  # images and videos, separated by ";"
    mask_strategy: str | None = None

    @property
    def texts(self) -> list[str]:
        """The texts of the prompt as they were given, without loops and JSON."""
        return prompts.split_segments(prompts.split_json(self.prompt)[0])[0]

    def refined(self, settings: InferenceSettings) -> Request:
        """The request in the words of `settings.refined`. Raises ConfigError if they say nothing."""
        return self._replace(encoded=_read_prompt(self.prompt, settings)[0])


class Size(NamedTuple):
    """What is asked of the models: frames, and height and width in pixels."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames} frames of {self.height}x{self.width}"


def check_supported(settings: InferenceSettings) -> None:
    """Raises ConfigError for a section that is missing or cannot be built, and for what this version cannot do."""
    from opensora import components

    check_sections(settings)
    for part in PARTS:
        components.check(getattr(settings, part), part)
    if refine.is_wanted(settings):
        if settings.offline:
            raise ConfigError("llm_refine asks a language model, but offline asks nobody; leave out one of the two")
        refine.endpoint(settings)
        if settings.text_encoder["type"] == "classes":
            raise ConfigError("llm_refine rewrites words, but these prompts are numbers of classes; leave it out")


def check_sections(settings: InferenceSettings) -> None:
    """The part of `check_supported` that loads no model's code."""
    for section in (*PARTS, "scheduler"):
        if getattr(settings, section) is None:
            raise ConfigError(f"the configuration has no {section}; add {section} = dict(type=..., ...)")
    for name in NOT_YET:
        value = getattr(settings, name)
        if value != getattr(InferenceSettings, name) and any(value if isinstance(value, list) else [value]):
            raise ConfigError(f"{name} is not supported yet; leave it out")
    tables = (registry.TEXT_ENCODERS, registry.AUTOENCODERS, registry.MODELS, registry.SCHEDULERS)
    for section, table in zip((*PARTS, "scheduler"), tables, strict=True):
        registry.check_type(section, getattr(settings, section)["type"], table)


def make_size(settings: InferenceSettings) -> Size:
    """The size asked for. Raises ConfigError when it is unknown or the autoencoder cannot make it."""
    if settings.image_size is not None:
        height, width = settings.image_size
    elif settings.resolution and settings.aspect_ratio:
        height, width = get_image_size(settings.resolution, settings.aspect_ratio)
    else:
        raise ConfigError("the size is missing: give --image-size H W, or --resolution and --aspect-ratio")
    if min(height, width) < SPATIAL_FACTOR:
        least = f"the autoencoder needs {SPATIAL_FACTOR} pixels a side"
        raise ConfigError(f"image_size {height}x{width} is too small: {least}")
    return Size(get_num_frames(settings.num_frames), height, width)


def make_requests(settings: InferenceSettings) -> list[Request]:
    """The results to make, in order. File numbers count from the first prompt of the list, whatever slice is made."""
    from opensora.conditioning import parse_mask_strategy

    texts = settings.prompt or (prompts.load_prompts(settings.prompt_path) if settings.prompt_path else [])
    given = [_one_each(settings, name, len(texts)) for name in ("reference_path", "mask_strategy")]
    rows = list(enumerate(zip(texts, *given, strict=True)))
    requests = []
    for index, (text, reference_path, mask_strategy) in rows[settings.start_index : settings.end_index]:
        encoded, info = _read_prompt(text, settings)
        if unused := [loop for loop in prompts.split_segments(encoded)[1] or () if loop >= settings.loop]:
            logger.warning("prompt %r has texts for loops %s, but --loop is %d", text, unused, settings.loop)
        conditions = {"reference_path": reference_path, "mask_strategy": mask_strategy, **info}
        if conditions["mask_strategy"]:
            parse_mask_strategy(conditions["mask_strategy"])
        for sample in range(settings.num_sample):
            name = (settings.sample_name, index, text, settings.prompt_as_path, settings.num_sample, sample)
            path = prompts.save_path_name(settings.save_dir, *name)
            requests.append(Request(text, encoded, sample, path, **conditions))
    return requests


def _one_each(settings: InferenceSettings, name: str, count: int) -> Sequence[str | None]:
    """One entry of a list setting for each of `count` prompts."""
    given = getattr(settings, name)
    if given and len(given) != count:
        raise ConfigError(f"{name} has {len(given)} entries for {count} prompts; give one each, '' for none")
    return given or [None] * count


def _read_prompt(text: str, settings: InferenceSettings) -> tuple[str, dict[str, str]]:
    """The prompt as it is encoded, and what its JSON tail says. Raises ConfigError for one that says nothing."""
    if not text.strip():
        raise ConfigError("a prompt is empty; describe the video in it, or remove the blank line from the prompt file")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"prompt {text!r} is not UTF-8 text") from error
    words, info = prompts.split_json(text)
    scores = {"aes": settings.aes, "flow": settings.flow, "camera_motion": settings.camera_motion}
    prepare = partial(prompts.prepare, words, refine=partial(_refined, settings.refined))
    if not refine.is_wanted(settings) and not prepare().strip():
        raise ConfigError(f"prompt {text!r} is empty once cleaned; describe the video in English words")
    return prepare(**scores), info


def _refined(refined: dict[str, Any] | None, text: str) -> str:
    """The text, or the one that was recorded in its place."""
    answer = text if refined is None else refined.get(text)
    if not isinstance(answer, str) or re.search("[\ud800-\udfff]", answer):
        raise ConfigError(f"refined has no text for {text!r}; leave refined out to ask the language model again")
    return answer
