"""The size and the requests of a call, one for each result, checked before any work."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from opensora import registry
from opensora.config.schema import shown
from opensora.config.sections import check_type
from opensora.config.settings import InferenceSettings
from opensora.datasets.aspect import get_image_size, get_num_frames, get_num_pixels, parse_ratio
from opensora.errors import ConfigError
from opensora.pipeline import prompt_refiner, prompts
from opensora.pipeline.mask_strategy import parse_mask_strategy
from opensora.pipeline.output_names import path_by_settings
from opensora.pipeline.reference_path import urls

SPATIAL_FACTOR = 8  # of the autoencoders: pixels per latent pixel along a side
MAX_SIDE, MAX_FRAMES = 16_384, 100_000  # of a clip
MAX_PIXELS = 2**33  # of all frames of a result: 24 GiB of levels
MAX_LOOPS, MAX_RESULTS = 1_000, 100_000
PARTS = ("text_encoder", "vae", "model")  # in the order in which they are read
# Documented settings without support yet; their defaults have no effect.
NOT_YET = ("prompt_generator",)


class Request(NamedTuple):
    """One result to generate."""

    prompt: str  # as given
    loop_texts: tuple[str, ...]  # what the text encoder reads in each loop
    sample: int  # of the prompt
    path: str  # without suffix
    seed: int
    reference_path: str | None = None  # images and videos, separated by ";"
    mask_strategy: str | None = None

    @property
    def reference_paths(self) -> list[str]:
        """The images and videos, one by one."""
        return self.reference_path.split(";") if self.reference_path else []

    @property
    def texts(self) -> list[str]:
        """The texts of the prompt as given, without loop numbers and JSON."""
        return prompts.split_segments(prompts.split_json(self.prompt)[0])[0]

    def refined(self, settings: InferenceSettings) -> Request:
        """The request with the texts of `settings.refined`. Raises ConfigError for an empty one."""
        return self._replace(loop_texts=prompts.read_prompt(self.prompt, settings).loop_texts)


class Size(NamedTuple):
    """A size as requested: frames, and height and width in pixels."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames} frames of {self.height}x{self.width}"

    @property
    def rounded(self) -> Size:
        """The size that is generated: sides rounded down to multiples of 8, the pixels of a latent pixel.

        Models pad latents to whole patches.
        """
        height, width = (side // SPATIAL_FACTOR * SPATIAL_FACTOR for side in self[1:])
        return Size(self.num_frames, height, width)

    @property
    def rounding_note(self) -> str:
        """Says how this size is rounded; empty if it is not."""
        rounded = self.rounded
        if rounded == self:
            return ""
        requested, rule = f"{self.height}x{self.width}", f"sides are rounded down to multiples of {SPATIAL_FACTOR}"
        return f"{requested} becomes {rounded.height}x{rounded.width}: {rule}"


def check_refiner(settings: InferenceSettings) -> None:
    """Raises ConfigError where a language model is to refine prompts but cannot, or the prompts are classes."""
    if not prompt_refiner.is_enabled(settings):
        return
    if settings.offline:
        raise ConfigError("llm_refine calls a language model, but offline is set; remove one of the two")
    prompt_refiner.endpoint(settings)
    if settings.section("text_encoder")["type"] == "classes":
        raise ConfigError("llm_refine rewrites words, but these prompts are numbers of classes; remove it")


def check_sections(settings: InferenceSettings) -> None:
    """Raises ConfigError for a section that is missing or of an unknown type, and for settings without support."""
    for section in (*PARTS, "scheduler"):
        settings.section(section)
    for name in NOT_YET:
        value = getattr(settings, name)
        if value != getattr(InferenceSettings, name) and any(value if isinstance(value, list) else [value]):
            raise ConfigError(f"{name} is not supported yet; remove it")
    tables = (registry.TEXT_ENCODERS, registry.AUTOENCODERS, registry.MODELS, registry.SCHEDULERS)
    for section, table in zip((*PARTS, "scheduler"), tables, strict=True):
        check_type(section, settings.section(section)["type"], table)


def make_size(settings: InferenceSettings) -> Size:
    """The size asked for. Raises ConfigError when it is unknown, out of bounds, or the autoencoder cannot make it."""
    if settings.image_size is not None:
        height, width = settings.image_size
    elif settings.resolution and settings.aspect_ratio:
        height, width = get_image_size(settings.resolution, settings.aspect_ratio)
    elif settings.resolution:
        get_num_pixels(settings.resolution)  # raises for an unknown name first
        remedy = "give --aspect-ratio too: 9:16 for landscape, 16:9 for portrait, 1:1, ..."
        raise ConfigError(f"--resolution {settings.resolution} has no aspect ratio; {remedy}")
    elif settings.aspect_ratio:
        parse_ratio(settings.aspect_ratio)
        ratio = settings.aspect_ratio
        raise ConfigError(f"--aspect-ratio {ratio} gives no number of pixels; give --resolution too, such as 240p")
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
        raise ConfigError(f"{problem}; use fewer frames, fewer loops or a smaller size")
    return Size(num_frames, height, width)


def check_addresses(settings: InferenceSettings, requests: Sequence[Request]) -> None:
    """Raises ConfigError where a file of prompts names a URL and downloads are not allowed."""
    if settings.prompt_path is None or settings.prompt or settings.allow_downloads:
        return
    given = {url for entry in settings.reference_path or () for url in urls(entry)}
    for request in requests:
        if named := [url for url in urls(request.reference_path) if url not in given]:
            problem = f"the prompts of {settings.prompt_path} name the address {named[0][:200]!r}"
            raise ConfigError(f"{problem}; --allow-downloads fetches it, or download it and give its path")


def check_keeps_frames(
    settings: InferenceSettings, scheduler: Any, requests: Sequence[Request], media_given: bool
) -> None:
    """Raises ConfigError if frames are to be kept, but the sampler or the model cannot."""
    if settings.loop == 1 and not media_given and not any(request.mask_strategy for request in requests):
        return
    if not scheduler.supports_edit:
        raise ConfigError(
            f"scheduler '{settings.section('scheduler')['type']}' cannot keep given frames; use rflow or iddpm"
        )
    if "x_mask" not in inspect.signature(registry.builder(settings.model["type"]).forward).parameters:
        raise ConfigError(f"model '{settings.model['type']}' cannot keep given frames; use STDiT, STDiT2 or STDiT3")


def make_requests(settings: InferenceSettings) -> list[Request]:
    """The results to make, in order. File numbers count from the first prompt of the list, also for a slice of it."""
    texts = settings.prompt or (prompts.load_prompts(settings.prompt_path) if settings.prompt_path else [])
    if (count := len(texts[settings.start_index : settings.end_index]) * settings.num_sample) > MAX_RESULTS:
        raise ConfigError(f"{shown(count)} results are requested, but the maximum is {MAX_RESULTS:,}; request fewer")
    given = [_per_prompt(settings, name, len(texts)) for name in ("reference_path", "mask_strategy")]
    rows = list(enumerate(zip(texts, *given, strict=True)))
    requests = []
    for index, (text, reference_path, mask_strategy) in rows[settings.start_index : settings.end_index]:
        prompt = prompts.read_prompt(text, settings)
        conditions = {"reference_path": reference_path, "mask_strategy": mask_strategy, **prompt.conditions}
        if conditions["mask_strategy"]:
            parse_mask_strategy(conditions["mask_strategy"])
        for sample in range(settings.num_sample):
            path = path_by_settings(settings, text, index, sample)
            requests.append(Request(text, prompt.loop_texts, sample, path, settings.seed, **conditions))
    return requests


def _per_prompt(settings: InferenceSettings, name: str, count: int) -> Sequence[str | None]:
    """One entry of a list setting for each of `count` prompts."""
    given = getattr(settings, name)
    if given and len(given) != count:
        raise ConfigError(f"{name} has {len(given)} entries for {count} prompts; give one each, '' for none")
    return given or [None] * count
