"""A request for a video: what a client gave, checked by the checks of `opensora generate` before it is queued."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from opensora.config.schema import shown
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError, did_you_mean
from opensora.pipeline import prompts
from opensora.pipeline.argument_names import changes_of
from opensora.pipeline.job_spec import JobSpec
from opensora.serving.adapters import adapter_files, named_adapters
from opensora.serving.limits import Limits
from opensora.serving.models import Models

MAX_SECONDS = 3_600


class VideoRequest(NamedTuple):
    """A request as it is stored: JSON values only.

    given: arguments of a call by the names of docs/python.md, with the seed that was drawn
    media: argument -> uploads and results it names, each an id that `#hold=17` and the like may follow
    """

    model: str
    given: dict[str, Any]
    media: dict[str, list[str]]

    def settings(self, base: InferenceSettings, source: Callable[[str], str]) -> InferenceSettings:
        """The settings of the call; `source` turns the id of a medium into a path. Raises ConfigError."""
        named = {
            name: [_source(one, source) for one in entries] for name, entries in self.media.items()
        }  # argument -> paths
        media: dict[str, Any] = {
            name: [";".join(paths)] if name == "reference_path" else paths[0] for name, paths in named.items()
        }
        given = {**self.given, "prompt": [self.given["prompt"]], **media}
        adapters = given.pop("lora", None)
        given = {name: tuple(value) if _is_pair(name, value) else value for name, value in given.items()}
        settings = dataclasses.replace(base, **changes_of(dataclasses.asdict(base), given))
        return dataclasses.replace(settings, lora=adapter_files(adapters)) if adapters else settings

    @property
    def batch_key(self) -> str | None:
        """Equal for requests that can be computed together; None for one that is computed alone."""
        if self.media or self.given.get("draft") or self.given.get("steps_until") or self.given.get("cache"):
            return None
        common = {name: value for name, value in self.given.items() if name not in ("prompt", "seed")}
        return hashlib.sha256(json.dumps([self.model, common], sort_keys=True).encode()).hexdigest()


class Checked(NamedTuple):
    """A request that passed the checks, and what it makes."""

    request: VideoRequest
    num_frames: int  # of a clip
    height: int
    width: int
    fps: float
    loops: int
    steps: int  # of the sampler, for a clip
    draft: bool


def make_request(
    given: Mapping[str, Any], media: Mapping[str, list[str]], model: str | None, models: Models, limits: Limits,
    adapters: Collection[str] = (),
) -> Checked:  # fmt: skip
    """Checks the values of a request. Raises ConfigError, MediaError or WeightsError, in one line."""
    name = model or next(iter(models))
    if name not in models:
        raise ConfigError(f"model {shown(name)} is not served{did_you_mean(name, models) or '; see /v1/models'}")
    base, given = models[name], dict(given)
    _check_prompt(given.get("prompt"))
    if "size" in given:
        given["image_size"] = _parse_size(given.pop("size"))
    if "lora" in given:
        given["lora"] = named_adapters(given["lora"], adapters)
    if given.get("seed") == -1:
        given["seed"] = secrets.randbelow(2**31)
    seconds = given.pop("seconds", None)
    if seconds is not None and "num_frames" not in given:
        given["num_frames"] = _frames(seconds, base, given)
    return check_request(VideoRequest(name, given, dict(media)), base, limits)


def check_request(request: VideoRequest, base: InferenceSettings, limits: Limits) -> Checked:
    """What a request makes. Raises ConfigError, MediaError or WeightsError."""
    settings = request.settings(base, _placeholder)
    spec = JobSpec(dataclasses.replace(settings, lora=base.lora), to_files=False)  # the planner opens adapters
    frames, height, width = spec.size
    if (pixels := frames * height * width * settings.loop) > limits.max_pixels:
        problem = f"{settings.loop} x {spec.size} are {pixels:,} pixels, and this server makes {limits.max_pixels:,}"
        raise ConfigError(f"{problem}; ask for fewer frames, fewer loops or a smaller size")
    steps = settings.section("scheduler").get("num_sampling_steps") or 1
    if steps > limits.max_steps:
        raise ConfigError(f"num_sampling_steps is {steps}; this server takes at most {limits.max_steps}")
    loops = 1 if spec.makes_drafts else settings.loop
    return Checked(request, frames, height, width, settings.output_fps, loops, steps, spec.makes_drafts)


def _check_prompt(prompt: Any) -> None:
    """Raises ConfigError for a prompt that is missing, no text, or names files in its JSON."""
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError("prompt is missing; describe the video in a text")
    if "reference_path" in prompts.split_json(prompt)[1]:
        raise ConfigError("the JSON of a prompt names files; upload them as image, extend, edit or reference_path")


def _parse_size(text: Any) -> list[int]:
    """(height, width) of "WxH"."""
    width, _, height = str(text).lower().replace("×", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal() and len(width) < 7 and len(height) < 7):
        raise ConfigError(f"size is {shown(text)}; write width x height in pixels, such as 640x480")
    return [int(height), int(width)]


def _frames(seconds: Any, base: InferenceSettings, given: Mapping[str, Any]) -> int:
    """The frames of a duration at the frame rate of the result."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MAX_SECONDS:
        raise ConfigError(f"seconds is {shown(seconds)}; give a number above 0, or num_frames")
    rates = {name: given[name] for name in ("fps", "save_fps", "frame_interval") if name in given}
    return max(round(seconds * dataclasses.replace(base, **rates).output_fps), 1)


def _is_pair(name: str, value: Any) -> bool:
    return name in ("image_size", "guidance_interval") and isinstance(value, list)


def _source(entry: str, source: Callable[[str], str]) -> str:
    name, mark, selection = entry.partition("#")
    return f"{source(name)}{mark}{selection}"


def _placeholder(name: str) -> str:
    """A source that stands for a stored medium in checks that open no file."""
    return f"memory:{hashlib.sha256(name.encode()).hexdigest()[:16]}"
