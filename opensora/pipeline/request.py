"""What is asked for, checked before any work: the size, and one request for each result."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from opensora import registry
from opensora.config.schema import shown
from opensora.config.settings import InferenceSettings
from opensora.datasets.aspect import get_image_size, get_num_frames, get_num_pixels, parse_ratio
from opensora.errors import ConfigError
from opensora.pipeline import prompt_refiner, prompts

logger = logging.getLogger("opensora")

SPATIAL_FACTOR = 8  # pixels along a side of what an autoencoder makes one latent pixel of
MAX_SIDE, MAX_FRAMES = 16_384, 100_000  # of a clip
MAX_PIXELS = 2**33  # of all frames of a result: 24 GiB of levels
MAX_LOOPS, MAX_RESULTS = 1_000, 100_000
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

    @property
    def made(self) -> Size:
        """What is made when this is asked for: sides rounded down to multiples of 8, whatever the model.

        An autoencoder makes 8x8 pixels of each latent pixel; latents that are no whole patches a model fills up and
        cuts again.
        """
        height, width = (side // SPATIAL_FACTOR * SPATIAL_FACTOR for side in self[1:])
        return Size(self.num_frames, height, width)

    @property
    def rounding(self) -> str:
        """What of this size is not made as it is asked for, in a sentence; empty where all is."""
        made = self.made
        if made == self:
            return ""
        asked, rule = f"{self.height}x{self.width}", f"sides are rounded down to multiples of {SPATIAL_FACTOR}"
        return f"{made.height}x{made.width} is made for {asked}: {rule}"


def check_supported(settings: InferenceSettings) -> None:
    """Raises ConfigError for a section that is missing or cannot be built, and for what this version cannot do."""
    from opensora.checkpoints import builder

    check_sections(settings)
    for part in PARTS:
        builder.check_section(getattr(settings, part), part)
    if prompt_refiner.is_wanted(settings):
        if settings.offline:
            raise ConfigError("llm_refine asks a language model, but offline asks nobody; leave out one of the two")
        prompt_refiner.endpoint(settings)
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
    """The size asked for. Raises ConfigError when it is unknown, out of bounds, or the autoencoder cannot make it."""
    if settings.image_size is not None:
        height, width = settings.image_size
    elif settings.resolution and settings.aspect_ratio:
        height, width = get_image_size(settings.resolution, settings.aspect_ratio)
    elif settings.resolution:
        get_num_pixels(settings.resolution)  # a name that is unknown is told first
        remedy = "give --aspect-ratio too: 9:16 for landscape, 16:9 for portrait, 1:1, ..."
        raise ConfigError(f"--resolution {settings.resolution} has no shape; {remedy}")
    elif settings.aspect_ratio:
        parse_ratio(settings.aspect_ratio)
        ratio = settings.aspect_ratio
        raise ConfigError(f"--aspect-ratio {ratio} says nothing of pixels; give --resolution too, such as 240p")
    else:
        raise ConfigError("the size is missing: give --image-size H W, or --resolution and --aspect-ratio")
    if min(height, width) < SPATIAL_FACTOR:
        least = f"the autoencoder needs {SPATIAL_FACTOR} pixels a side"
        raise ConfigError(f"image_size {height}x{width} is too small: {least}")
    if max(height, width) > MAX_SIDE:
        most = f"a side has at most {MAX_SIDE:,} pixels"
        raise ConfigError(f"image_size {shown(height)}x{shown(width)} is too large: {most}")
    num_frames = get_num_frames(settings.num_frames)
    if not 1 <= num_frames <= MAX_FRAMES:
        raise ConfigError(f"num_frames is {shown(num_frames)}; a clip has 1 to {MAX_FRAMES:,} frames")
    if settings.loop > MAX_LOOPS:
        raise ConfigError(f"loop is {shown(settings.loop)}; at most {MAX_LOOPS:,} clips are joined")
    if (pixels := num_frames * height * width * settings.loop) > MAX_PIXELS:
        problem = f"{settings.loop} x {Size(num_frames, height, width)} are {pixels:,} pixels, above {MAX_PIXELS:,}"
        raise ConfigError(f"{problem}; ask for fewer frames, fewer loops or a smaller size")
    return Size(num_frames, height, width)


def make_requests(settings: InferenceSettings) -> list[Request]:
    """The results to make, in order. File numbers count from the first prompt of the list, whatever slice is made."""
    from opensora.pipeline.mask_strategy import parse_mask_strategy

    texts = settings.prompt or (prompts.load_prompts(settings.prompt_path) if settings.prompt_path else [])
    if (count := len(texts[settings.start_index : settings.end_index]) * settings.num_sample) > MAX_RESULTS:
        raise ConfigError(f"{shown(count)} results are asked for, and at most {MAX_RESULTS:,} are made; ask for fewer")
    given = [_one_each(settings, name, len(texts)) for name in ("reference_path", "mask_strategy")]
    rows = list(enumerate(zip(texts, *given, strict=True)))
    requests = []
    for index, (text, reference_path, mask_strategy) in rows[settings.start_index : settings.end_index]:
        encoded, info = _read_prompt(text, settings)
        if unused := [loop for loop in prompts.split_segments(encoded)[1] or () if loop >= settings.loop]:
            told = (shown(text), unused[:10], settings.loop)
            logger.warning("prompt %s has texts for loops %s, but --loop is %d", *told)
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
    _check_encodable(text, "prompt")
    words, info = prompts.split_json(text)
    given = {"aes": settings.aes, "flow": settings.flow, "camera_motion": settings.camera_motion}
    scores = {name: score for name, score in given.items() if score is not None}
    prepare = partial(prompts.prepare, words, refine=partial(_refined, settings.refined))
    prepared = bare = prepare()
    if scores:
        prepared = prepare(**scores)
    if not prompt_refiner.is_wanted(settings) and not bare.strip():
        raise ConfigError(f"prompt {shown(text)} is empty once cleaned; describe the video in English words")
    return prepared, info


def _check_encodable(text: str, what: str) -> None:
    """Raises ConfigError for a text that is too long or not UTF-8."""
    prompts.check_length(text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what} {shown(text)} is not UTF-8 text") from error


def negative_text(settings: InferenceSettings) -> str | None:
    """What stands in the place of the null text, cleaned like a prompt; None where guidance leads away from nothing.

    Raises ConfigError for a text that says nothing, and where a model has no text.
    """
    text = settings.negative_prompt
    if text is None:
        return None
    if (settings.text_encoder or {}).get("type") == "classes":
        raise ConfigError("negative_prompt is a text, but these prompts are numbers of classes; leave it out")
    _check_encodable(text, "negative_prompt")
    if prompts.split_segments(text)[1]:
        raise ConfigError("negative_prompt is one text for all loops; leave out |0|")
    cleaned = prompts.prepare(text)
    if not cleaned.strip():
        raise ConfigError(f"negative_prompt {shown(text)} is empty once cleaned; give English words, or leave it out")
    return cleaned


def _refined(refined: dict[str, Any] | None, text: str) -> str:
    """The text, or the one that was recorded in its place."""
    answer = text if refined is None else refined.get(text)
    if not isinstance(answer, str) or re.search("[\ud800-\udfff]", answer):
        raise ConfigError(f"refined has no text for {shown(text)}; leave refined out to ask the language model again")
    return answer
