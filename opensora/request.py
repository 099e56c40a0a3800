"""What is asked for, checked before any work: the size, and one request for each result."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from opensora import components, prompts, registry
from opensora.datasets.aspect import get_image_size, get_num_frames
from opensora.errors import ConfigError
from opensora.settings import InferenceSettings

logger = logging.getLogger("opensora")

SPATIAL_FACTOR = 8
PARTS = ("text_encoder", "vae", "model")  # in the order in which they are read
# Settings of the documents that this version cannot follow: setting -> the values that ask for nothing.
NOT_YET = {
    "loop": (1,),
    "reference_path": (None,),
    "mask_strategy": (None,),
    "llm_refine": (False,),
    "watermark": (False,),
    "prompt_generator": ("",),
}


@dataclass(frozen=True)
class Request:
    """One result to make: the prompt as given and as encoded, which of its samples, and where it goes."""

    prompt: str
    encoded: str
    sample: int
    path: str  # without suffix


@dataclass(frozen=True)
class Size:
    """What is asked of the models (frames, height, width in pixels) and what comes out of the autoencoder."""

    num_frames: int
    height: int
    width: int

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the result: whole latents only."""
        return self.height // SPATIAL_FACTOR * SPATIAL_FACTOR, self.width // SPATIAL_FACTOR * SPATIAL_FACTOR


def check_supported(settings: InferenceSettings) -> None:
    """Raises ConfigError for a section that is missing or cannot be built, and for what this version cannot do."""
    for section in (*PARTS, "scheduler"):
        if getattr(settings, section) is None:
            raise ConfigError(f"the configuration has no {section}; add {section} = dict(type=..., ...)")
    for name, nothing in NOT_YET.items():
        value = getattr(settings, name)
        if value not in nothing and any(value if isinstance(value, list) else [value]):
            raise ConfigError(f"{name} is not supported yet; leave it out")
    for part in PARTS:
        components.check(getattr(settings, part), part)
    registry.check_type("scheduler", settings.scheduler["type"], registry.SCHEDULERS)


def make_size(settings: InferenceSettings) -> Size:
    """The size asked for. Raises ConfigError when it is unknown or the autoencoder cannot make it."""
    num_frames = get_num_frames(settings.num_frames)
    if settings.image_size is not None:
        height, width = settings.image_size
    elif settings.resolution and settings.aspect_ratio:
        height, width = get_image_size(settings.resolution, settings.aspect_ratio)
    else:
        raise ConfigError("the size is missing: give --image-size H W, or --resolution and --aspect-ratio")
    if min(height, width) < SPATIAL_FACTOR:
        raise ConfigError(
            f"image_size {height}x{width} is too small: the autoencoder needs {SPATIAL_FACTOR} pixels a side"
        )
    return Size(num_frames, height, width)


def make_requests(settings: InferenceSettings) -> list[Request]:
    """The results to make, in order. File numbers count from the first prompt of the list, whatever slice is made."""
    texts = settings.prompt
    if not texts and settings.prompt_path:
        texts = prompts.load_prompts(settings.prompt_path)
    requests = []
    for index, text in list(enumerate(texts or []))[settings.start_index : settings.end_index]:
        _check_prompt(text)
        encoded = prompts.prepare(text, aes=settings.aes, flow=settings.flow, camera_motion=settings.camera_motion)
        for sample in range(settings.num_sample):
            name = (settings.sample_name, index, text, settings.prompt_as_path, settings.num_sample, sample)
            path = prompts.save_path_name(settings.save_dir, *name)
            requests.append(Request(text, encoded, sample, path))
    return requests


def _check_prompt(text: str) -> None:
    prompts.check_prompt(text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"prompt {text!r} is not UTF-8 text") from error
    if prompts.split_json(text)[1] or prompts.split_segments(text)[1] is not None:
        raise ConfigError(f"prompt {text!r}: references and |loop| texts are not supported yet; give one plain text")
    if not prompts.prepare(text).strip():
        raise ConfigError(f"prompt {text!r} is empty once cleaned; describe the video in English words")
