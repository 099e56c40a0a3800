"""The state of one call of a pipeline: what is asked for, what has been prepared for it, and how long stages took."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from opensora import registry
from opensora.acceleration.step_cache.cached_sampling import Cache
from opensora.config.settings import InferenceSettings
from opensora.models.sizes import conditioning_kind, size_conditioning
from opensora.pipeline import draft, media_conditions, step_cache, watermark
from opensora.pipeline.draft import Draft
from opensora.pipeline.in_memory_media import InMemoryMedia
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.mask_strategy import ClipConditioning
from opensora.pipeline.outputs import Outputs
from opensora.pipeline.prompts import negative_text
from opensora.pipeline.recipe import Recipe, make_recipe
from opensora.pipeline.references import References
from opensora.pipeline.request import (
    Request,
    check_addresses,
    check_keeps_frames,
    check_refiner,
    check_sections,
    make_requests,
    make_size,
)

logger = logging.getLogger("opensora")
T = TypeVar("T")


class Job:
    """The requests of one call and their state. What needs no model is checked on construction.

    sample: generate only this sample of each prompt
    drafts: the drafts to finish, one for each prompt
    media: images and videos in memory that the settings name
    to_files: name the outputs of the requests, and refuse names that clash
    Raises ConfigError or MediaError.
    """

    def __init__(
        self, settings: InferenceSettings, models: LoadedModels, *, sample: int | None = None,
        drafts: Sequence[Draft] = (), media: Sequence[InMemoryMedia] = (), to_files: bool = True,
    ) -> None:  # fmt: skip
        check_sections(settings)
        check_refiner(settings)
        self.settings = settings
        self.size = make_size(settings)
        self.frame_size = self.size.rounded[1:]  # (height, width) in pixels of the output
        self.scheduler = registry.build(settings.section("scheduler"))
        self.cache = step_cache.from_settings(settings)
        self.stop = draft.steps_to_take(settings, self.scheduler)
        kind = settings.multi_resolution or conditioning_kind(settings.model["type"])
        height_width, num_frames = self.size[1:], self.size.num_frames
        self.conditioning = size_conditioning(kind, 1, height_width, num_frames, settings.fps, device=models.device)
        watermark.check(settings.watermark, self.frame_size)

        named = settings if sample is None and not drafts else dataclasses.replace(settings, num_sample=1)
        requests = make_requests(named)
        self.outputs = Outputs(named, self.size.num_frames, bool(self.stop))
        self.to_files = to_files
        if to_files:
            requests = self.outputs.assign_paths(requests)
        if sample is not None:
            requests = [request._replace(sample=sample) for request in requests]
        if drafts:
            pairs = zip(requests, drafts, strict=True)
            requests = [one._replace(sample=begun.recipe["sample_index"], path=begun.path) for one, begun in pairs]
        self.requests: list[Request] = requests
        self.drafts = {one.path: one for one in drafts}

        check_addresses(settings, requests)
        self.negative_text = negative_text(settings)
        if self.negative_text is not None and self.scheduler.num_branches == 1:
            logger.warning("negative_prompt has no effect: at cfg_scale 1 nothing is guided")
            self.negative_text = None
        given = media_conditions.media_paths(settings)
        check_keeps_frames(settings, self.scheduler, requests, bool(given))
        self.references = References(self.frame_size, offline=settings.offline, media=media)
        for path in dict.fromkeys([*(one.reference_path for one in requests), ";".join(given)]):
            self.references.check(path)

        self.align = settings.align  # latent frames that references start at multiples of
        self.reference_hashes: dict[str | None, dict[str, str]] = {}
        self.timelines: dict[Request, list[ClipConditioning]] = {}  # of each request, a clip for each loop
        self.overlap = 0  # frames that each clip shares with the one before
        self.seconds: dict[str, float] = {}  # stage -> seconds
        self._alone = models.layout.world_size > 1  # all ranks denoise one sample together

    @property
    def batch_size(self) -> int:
        """Requests that are denoised together: 1 where the result or its state would depend on the others."""
        alone = self._alone or self.stop or self.drafts or self.settings.cache != "none" or not self.cache.is_exact
        return 1 if alone else max(min(self.settings.batch_size, len(self.requests)), 1)

    def texts(self, request: Request) -> list[str]:
        """The text of each loop."""
        return list(request.loop_texts)

    def texts_of(self, requests: Sequence[Request]) -> list[str]:
        """Each text of these requests once."""
        return list(dict.fromkeys(text for one in requests for text in self.texts(one)))

    def use_refined(self, answers: dict[str, str], llm_model: str) -> None:
        """Takes the answers of a language model, text by text, into the settings, and so into recipes."""
        self.settings = dataclasses.replace(self.settings, refined=answers, llm_model=llm_model)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds of the block to those of a stage."""
        begin = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin

    def timed_steps(self, stage: str, steps: Iterator[T]) -> Iterator[T]:
        """The items of an iterator, with the seconds that it takes for each."""
        while True:
            with self.timed(stage):
                item = next(steps, None)
            if item is None:
                return
            yield item

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Within it nothing is approximated: no step cache, no guidance interval."""
        before, self.cache = self.cache, Cache()
        try:
            yield
        finally:
            self.cache = before

    def recipe(self, request: Request, models: LoadedModels) -> Recipe:
        """How the result of a request is made by loaded models. That of a draft keeps the settings of the draft."""
        begun = self.drafts.get(request.path)
        settings = begun.recipe["settings"] if begun else self._recorded_settings(request, models.plan.name)
        return make_recipe(
            request.prompt, self.texts(request), settings["seed"], request.sample, settings=settings,
            weights=models.hashes(), references=self.reference_hashes[request.reference_path],
        )  # fmt: skip

    def _recorded_settings(self, request: Request, memory: str) -> dict[str, Any]:
        """Every setting that a result depends on, with the conditions and refined texts of this request alone."""
        settings = dataclasses.asdict(self.settings)
        settings |= dict.fromkeys((*media_conditions.NAMES, "llm_base_url"))
        settings |= {"align": self.align, "guidance_ranks": "auto", "memory": memory}
        settings["watermark"] = watermark.text_of(settings["watermark"]) or False
        if refined := settings["refined"]:
            settings["refined"] = {text: refined[text] for text in request.texts}
        for name in ("reference_path", "mask_strategy"):
            settings[name] = [getattr(request, name)] if getattr(request, name) else None
        return step_cache.recipe_settings(settings, self.cache)
