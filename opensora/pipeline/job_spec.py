"""The first stage of every call: makes the requests, with all checks that need neither torch nor a model.

So the command line reports most mistakes before the slow import of torch.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from opensora.acceleration.device_names import check_device_name
from opensora.checkpoints.sections import check_local_weights, check_section
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError
from opensora.pipeline import media_conditions, reference_path
from opensora.pipeline.adapter_uses import check_adapters_exist
from opensora.pipeline.output_folder import output_folder
from opensora.pipeline.outputs import Outputs
from opensora.pipeline.prompts import negative_text
from opensora.pipeline.request import (
    PARTS,
    Request,
    check_addresses,
    check_refiner,
    check_sections,
    make_requests,
    make_size,
)

if TYPE_CHECKING:
    from opensora.pipeline.draft import Draft

logger = logging.getLogger("opensora")


class Place(NamedTuple):
    """Where the result of a prompt goes, a path without suffix, and the seed that it is made with."""

    path: str
    seed: int


class JobSpec:
    """The requests of a call, their size, and where the results go.

    sample: generate only this sample of each prompt
    drafts: the drafts to finish, one for each prompt
    places: for each prompt, its own seed and the path of its result, which it may replace
    to_files: name the output files of the requests, and refuse names that clash
    Raises ConfigError, MediaError or WeightsError.
    """

    def __init__(
        self, settings: InferenceSettings, *, sample: int | None = None, drafts: Sequence[Draft] = (),
        places: Sequence[Place] = (), to_files: bool = True,
    ) -> None:  # fmt: skip
        check_sections(settings)
        check_device_name(settings.device)
        check_refiner(settings)
        self.settings, self.to_files, self.drafts, self.places = settings, to_files, list(drafts), list(places)
        self.size = make_size(settings)
        self.media = media_conditions.media_paths(settings)  # images and videos that the settings name
        for path in [*self.media, *(settings.reference_path or ())]:
            reference_path.check_exist(path)
        for part in PARTS:
            check_section(getattr(settings, part), part)
            check_local_weights(getattr(settings, part), part)
        check_adapters_exist(settings.lora)

        numbered = settings if sample is None and not drafts else dataclasses.replace(settings, num_sample=1)
        requests = make_requests(numbered)
        if not requests:
            raise ConfigError("no prompt given: give one, or --prompt-path with a file of prompts")
        check_addresses(settings, requests)
        for text in dict.fromkeys(request.reference_path for request in requests):
            reference_path.check_exist(text)
        self.outputs = Outputs(numbered, self.size.num_frames, self.makes_drafts)
        if to_files:
            requests = self.outputs.assign_paths(requests)
        if sample is not None:
            requests = [request._replace(sample=sample) for request in requests]
        if drafts:
            pairs = zip(requests, drafts, strict=True)
            requests = [
                request._replace(sample=stopped.recipe["sample_index"], path=stopped.path) for request, stopped in pairs
            ]
        if places:
            placed = zip(requests, places, strict=True)
            requests = [request._replace(seed=place.seed, path=place.path) for request, place in placed]
            for place in places:
                self.outputs.allow_replacing(place.path)
        self.requests: list[Request] = requests
        self.negative_text = negative_text(settings)

    @property
    def makes_drafts(self) -> bool:
        """Whether the results are drafts."""
        return self.settings.draft or self.settings.steps_until is not None

    @property
    def wanted(self) -> list[Request]:
        """The requests to generate: all but those whose existing results are kept."""
        return [request for request in self.requests if not self.outputs.keeps_existing(request.path)]

    def check_outputs(self) -> None:
        """Raises MediaError where the folder cannot be written to, or a file there may not be replaced."""
        if wanted := self.wanted:
            with output_folder(self.outputs.folder):
                self.outputs.check_conflicts([request.path for request in wanted])
