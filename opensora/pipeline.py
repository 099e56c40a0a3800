"""From a request to files: check, encode the text, sample latents, decode, write each result with its recipe."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opensora import components, registry
from opensora.acceleration.device import inference_dtype, keep_allocations_in_heap, pick_device
from opensora.datasets import video
from opensora.errors import ConfigError
from opensora.models.sizes import size_conditioning
from opensora.noise import initial_noise
from opensora.recipe import check_folder, make_recipe, write_output
from opensora.request import PARTS, SPATIAL_FACTOR, Request, Size, check_supported, make_requests, make_size
from opensora.settings import InferenceSettings
from opensora.weights import Summary

logger = logging.getLogger("opensora")


class Output(NamedTuple):
    """A result: where it lies, its frames uint8 [T, H, W, 3], and the preview's path if one was asked for."""

    path: Path
    frames: np.ndarray
    preview: Path | None = None


class VideoPipeline:
    """Makes the videos of an inference request.

    Everything that can be refused is refused on construction, before any weight is read. Every sample is denoised by
    itself, from noise keyed by (seed, number of the sample of its prompt, loop): its bits do not depend on the batch
    size, on the other prompts or on its place among them.
    """

    def __init__(self, settings: InferenceSettings) -> None:
        self.settings = settings
        check_supported(settings)
        self.size = make_size(settings)
        self.device = pick_device(settings.device)
        self.dtype = inference_dtype(self.device, settings.dtype)
        self.scheduler = registry.build(settings.scheduler)
        kind, size = settings.multi_resolution or "STDiT2", self.size
        self.conditioning = size_conditioning(kind, 1, size[1:], size.num_frames, settings.fps, device=self.device)
        self.requests = make_requests(settings)
        self.summaries: dict[str, Summary] = {}

    @classmethod
    def from_settings(cls, settings: InferenceSettings) -> VideoPipeline:
        """The pipeline of checked settings; weights are read when they are first needed."""
        return cls(settings)

    def generate(self) -> Iterator[Output]:
        """Makes and writes the results one after the other.

        With `prompt_as_path`, those that exist are kept. All weights are located before any is read.
        """
        if not self.requests:
            raise ConfigError("there is no prompt: give one, or --prompt-path with a file of prompts")
        wanted = [request for request in self.requests if not self._exists(request)]
        if not wanted:
            return
        with _output_folder(self.settings.save_dir):
            for part in PARTS:
                components.find(getattr(self.settings, part), part, self.settings.offline)
            asked = [self.size.height, self.size.width]
            made = [side // SPATIAL_FACTOR * SPATIAL_FACTOR for side in asked]
            if made != asked:
                logger.info("frames of %dx%d are made for %dx%d: sides are multiples of 8", *made, *asked)
            texts = self.encode_texts([request.encoded for request in wanted])
            for request in wanted:
                with _memory_advice(self.size):
                    frames = self.make(texts[request.encoded], request.sample)
                yield self._write(request, frames)

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Features [1, 1, L, C] of each text, at its real length; the text encoder is freed afterwards."""
        keep_allocations_in_heap()
        encoder = self._load("text_encoder", components.load_text_encoder)
        return {text: encoder.encode([text])[0].to(self.dtype) for text in dict.fromkeys(texts)}

    @cached_property
    def vae(self) -> Any:
        """The video autoencoder."""
        return self._load("vae", components.load_vae)

    @cached_property
    def model(self) -> Any:
        """The diffusion transformer."""
        made = self.vae.out_channels
        model = self._load("model", components.load_model)
        _tell_untrained(self.size, components.trained_sizes(self.summaries["model"].path))
        if model.in_channels != made:
            raise ConfigError(f"the model takes {model.in_channels} latent channels, but the autoencoder makes {made}")
        return model

    def _load(self, part: str, load: Callable[..., components.Loaded]) -> Any:
        """A part of the configuration with its weights, whose summary is kept."""
        settings = self.settings
        loaded, self.summaries[part] = load(getattr(settings, part), self.device, self.dtype, settings.offline)
        logger.info("%-13s %s", part.replace("_", " "), self.summaries[part])
        return loaded

    @torch.no_grad()
    def make(self, text: Tensor, sample: int) -> np.ndarray:
        """The frames uint8 [T, H, W, 3] of sample number `sample` of a prompt with these text features."""
        model, vae, size = self.model, self.vae, self.size
        _check_text(text, model.config)
        noise = initial_noise(self.settings.seed, sample, 0, (vae.out_channels, *vae.get_latent_size(size)))
        cond, null = {"y": text, **self.conditioning}, {"y": model.null_caption(text)}
        options = {**size._asdict(), "progress": self.settings.verbose > 0}
        latents = self.scheduler.sample(model, noise[None].to(self.device), cond, null, **options)
        decoded = vae.decode(latents.to(self.dtype), num_frames=size.num_frames)
        return video.to_uint8(decoded[0].float())

    def _exists(self, request: Request) -> bool:
        path = Path(f"{request.path}.{'png' if self.size.num_frames == 1 else 'mp4'}")
        exists = self.settings.prompt_as_path and path.is_file()
        if exists:
            logger.info("%s exists and is kept", path)
        return exists

    def _write(self, request: Request, frames: np.ndarray) -> Output:
        settings = dataclasses.asdict(self.settings)
        weights = {part: summary.sha256 for part, summary in self.summaries.items()}
        recipe = make_recipe(
            request.prompt, [request.encoded], settings["seed"], request.sample, settings=settings, weights=weights
        )
        path = write_output(frames, request.path, self.settings.output_fps, recipe)
        if not self.settings.preview:
            return Output(path, frames)
        return Output(path, frames, video.write_image(video.contact_sheet(frames), f"{request.path}.preview.png"))


def _check_text(text: Tensor, config: dict[str, Any]) -> None:
    """Raises ConfigError when a model of this configuration cannot take text features [1, 1, L, C]."""
    channels, longest = config["caption_channels"], config["model_max_length"]
    if text.shape[3] != channels:
        raise ConfigError(f"the model takes {channels} text channels, but the text encoder makes {text.shape[3]}")
    if text.shape[2] > longest:
        remedy = f"shorten it, or cut it with --cfg-options text_encoder.model_max_length={longest}"
        raise ConfigError(f"a prompt has {text.shape[2]} tokens, but the model takes {longest}; {remedy}")


def _tell_untrained(size: Size, trained: list[list[int]]) -> None:
    """Warns where the model's own record of what it was trained on does not list the size asked for."""
    if trained and list(size) not in trained:
        known = ", ".join(str(Size(*one)) for one in trained)
        logger.warning("this model was trained on %s: expect noise at %s", known, size)


@contextmanager
def _output_folder(path: str) -> Iterator[None]:
    """Checks that `path` can be written to, and removes the folders made for it if nothing was written."""
    folder = Path(path)
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        check_folder(folder)
        yield
    finally:
        for part in made:
            with suppress(OSError):
                part.rmdir()


@contextmanager
def _memory_advice(size: Size) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ConfigError(f"memory does not suffice for {size}; ask for a smaller size or fewer frames") from error
