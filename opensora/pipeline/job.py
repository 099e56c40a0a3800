"""The state of one call of a pipeline: its requests, what is prepared for them, and the seconds of each stage."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from opensora import registry
from opensora.acceleration.step_cache.cached_sampling import Cache
from opensora.models.sizes import conditioning_kind, size_conditioning
from opensora.pipeline import draft, media_conditions, step_cache, watermark
from opensora.pipeline.in_memory_media import InMemoryMedia
from opensora.pipeline.job_spec import JobSpec
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.mask_strategy import ClipConditioning
from opensora.pipeline.recipe import Recipe, make_recipe
from opensora.pipeline.references import References
from opensora.pipeline.request import PARTS, Request, check_keeps_frames

logger = logging.getLogger("opensora")
T = TypeVar("T")


class Job:
    """The requests of one call and their state.

    `media` holds the images and videos in memory that the settings name. Raises ConfigError or MediaError.
    """

    def __init__(self, spec: JobSpec, models: LoadedModels, media: Sequence[InMemoryMedia] = ()) -> None:
        settings = self.settings = spec.settings
        self.size, self.requests, self.outputs, self.to_files = spec.size, spec.requests, spec.outputs, spec.to_files
        self.frame_size = self.size.rounded[1:]  # (height, width) in pixels of the output
        self.scheduler = registry.build(settings.section("scheduler"))
        self.cache = step_cache.from_settings(settings)
        self.stop = draft.steps_to_take(settings, self.scheduler)
        kind = settings.multi_resolution or conditioning_kind(settings.model["type"])
        height_width, num_frames = self.size[1:], self.size.num_frames
        self.conditioning = size_conditioning(kind, 1, height_width, num_frames, settings.fps, device=models.device)
        watermark.check(settings.watermark, self.frame_size)
        self.drafts = {one.path: one for one in spec.drafts}
        self.separate = bool(spec.places)  # requests of several callers: a recipe tells of none but its own
        self.negative_text = spec.negative_text
        if self.negative_text is not None and self.scheduler.num_branches == 1:
            logger.warning("negative_prompt has no effect: at cfg_scale 1 nothing is guided")
            self.negative_text = None
        check_keeps_frames(settings, self.scheduler, self.requests, bool(spec.media))
        self.references = References(self.frame_size, offline=settings.offline, media=media)
        for path in dict.fromkeys([*(one.reference_path for one in self.requests), ";".join(spec.media)]):
            self.references.check(path)

        self.align = settings.align  # references start at multiples of this number of latent frames
        self.reference_hashes: dict[str | None, dict[str, str]] = {}
        self.timelines: dict[Request, list[ClipConditioning]] = {}  # request -> conditioning of the clip of each loop
        self.overlap = 0  # frames that each clip shares with the previous one
        self.seconds: dict[str, float] = {}  # stage -> seconds
        self._is_parallel = models.layout.world_size > 1  # all ranks denoise one sample together

    @property
    def batch_size(self) -> int:
        """The largest batch: 1 for drafts, step caches and several ranks, where a result could depend on the others."""
        single = (
            self._is_parallel or self.stop or self.drafts or self.settings.cache != "none" or not self.cache.is_exact
        )
        return 1 if single else max(min(self.settings.batch_size, len(self.requests)), 1)

    def texts(self, request: Request) -> list[str]:
        """What the text encoder reads in each loop."""
        return list(request.loop_texts)

    def texts_of(self, requests: Sequence[Request]) -> list[str]:
        """The texts of these requests, without duplicates."""
        return list(dict.fromkeys(text for one in requests for text in self.texts(one)))

    def use_refined(self, answers: dict[str, str], llm_model: str) -> None:
        """Stores the answers of a language model (text -> refined text) in the settings, and so in recipes."""
        self.settings = dataclasses.replace(self.settings, refined=answers, llm_model=llm_model)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds of the block to those of a stage."""
        begin = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin

    def timed_steps(self, stage: str, steps: Iterator[T]) -> Iterator[T]:
        """The items of an iterator, which are timed as `stage`."""
        while True:
            with self.timed(stage):
                item = next(steps, None)
            if item is None:
                return
            yield item

    @contextmanager
    def without_approximations(self) -> Iterator[None]:
        """Disables the step cache and the guidance interval within the block."""
        before, self.cache = self.cache, Cache()
        try:
            yield
        finally:
            self.cache = before

    def recipe(self, request: Request, models: LoadedModels) -> Recipe:
        """The recipe of the result of a request. The result of a continued draft keeps the settings of the draft."""
        stopped = self.drafts.get(request.path)
        settings = stopped.recipe["settings"] if stopped else self._recorded_settings(request, models.plan.name)
        return make_recipe(
            request.prompt, self.texts(request), settings["seed"], request.sample, settings=settings,
            weights=models.hashes(), references=self.reference_hashes[request.reference_path],
        )  # fmt: skip

    def _recorded_settings(self, request: Request, memory: str) -> dict[str, Any]:
        """Every setting that a result depends on, with the references and refined texts of this request only."""
        settings = dataclasses.asdict(self.settings) | {"seed": request.seed}
        if self.separate:
            settings |= {"prompt": [request.prompt], "batch_size": 1}
            settings |= {part: _without_folders(settings[part]) for part in PARTS}
        settings |= dict.fromkeys((*media_conditions.NAMES, "llm_base_url"))
        settings |= {"align": self.align, "guidance_ranks": "auto", "memory": memory}
        settings["watermark"] = watermark.text_of(settings["watermark"]) or False
        if refined := settings["refined"]:
            settings["refined"] = {text: refined[text] for text in request.texts}
        for name in ("reference_path", "mask_strategy"):
            settings[name] = [getattr(request, name)] if getattr(request, name) else None
        return step_cache.recipe_settings(settings, self.cache)


def _without_folders(section: dict[str, Any] | None) -> dict[str, Any] | None:
    """A section whose weights are named without their folders, if they are named by an absolute path."""
    source = (section or {}).get("from_pretrained")
    if section is None or not isinstance(source, str) or not Path(source).is_absolute():
        return section
    return {**section, "from_pretrained": Path(source).name}
