"""What is asked for, checked before any work: the size, and one request for each result."""

from __future__ import annotations

from typing import NamedTuple

from opensora import components, prompts, registry
from opensora.datasets.aspect import get_image_size, get_num_frames
from opensora.errors import ConfigError
from opensora.settings import InferenceSettings

SPATIAL_FACTOR = 8
PARTS = ("text_encoder", "vae", "model")  # in the order in which they are read
# Settings of the documents that this version cannot follow; their defaults ask for nothing.
NOT_YET = ("loop", "reference_path", "mask_strategy", "llm_refine", "watermark", "prompt_generator")


class Request(NamedTuple):
    """One result to make: the prompt as given and as encoded, which of its samples, and where it goes."""

    prompt: str
    encoded: str
    sample: int
    path: str  # without suffix


class Size(NamedTuple):
    """What is asked of the models: frames, and height and width in pixels."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames} frames of {self.height}x{self.width}"


def check_supported(settings: InferenceSettings) -> None:
    """Raises ConfigError for a section that is missing or cannot be built, and for what this version cannot do."""
    for section in (*PARTS, "scheduler"):
        if getattr(settings, section) is None:
            raise ConfigError(f"the configuration has no {section}; add {section} = dict(type=..., ...)")
    for name in NOT_YET:
        value = getattr(settings, name)
        if value != getattr(InferenceSettings, name) and any(value if isinstance(value, list) else [value]):
            raise ConfigError(f"{name} is not supported yet; leave it out")
    for part in PARTS:
        components.check(getattr(settings, part), part)
    registry.check_type("scheduler", settings.scheduler["type"], registry.SCHEDULERS)


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
    from_file = prompts.load_prompts(settings.prompt_path) if settings.prompt_path and not settings.prompt else []
    requests = []
    for index, text in list(enumerate(settings.prompt or from_file))[settings.start_index : settings.end_index]:
        _check_prompt(text)
        encoded = prompts.prepare(text, aes=settings.aes, flow=settings.flow, camera_motion=settings.camera_motion)
        for sample in range(settings.num_sample):
            name = (settings.sample_name, index, text, settings.prompt_as_path, settings.num_sample, sample)
            path = prompts.save_path_name(settings.save_dir, *name)
            requests.append(Request(text, encoded, sample, path))
    return requests


def _check_prompt(text: str) -> None:
    if not text.strip():
        raise ConfigError("a prompt is empty; describe the video in it, or remove the blank line from the prompt file")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"prompt {text!r} is not UTF-8 text") from error
    if prompts.split_json(text)[1] or prompts.split_segments(text)[1] is not None:
        raise ConfigError(f"prompt {text!r}: references and |loop| texts are not supported yet; give one plain text")
    if not prompts.prepare(text).strip():
        raise ConfigError(f"prompt {text!r} is empty once cleaned; describe the video in English words")
