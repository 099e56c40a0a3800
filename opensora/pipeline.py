"""From a request to files: check, encode the text, sample latents, decode, write each result with its recipe."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opensora import components, estimate, refine, registry, watermark, wishes
from opensora.acceleration.device import inference_dtype, keep_allocations_in_heap, pick_device
from opensora.conditioning import Clip, parse_mask_strategy, place, timeline
from opensora.datasets import video
from opensora.errors import ConfigError
from opensora.models.sizes import size_conditioning
from opensora.models.text_encoder.classes import ClassIds
from opensora.models.text_encoder.t5 import T5Encoder
from opensora.noise import initial_noise, noise_generator
from opensora.prompts import text_of_loop
from opensora.recipe import check_folder, make_recipe, write_output
from opensora.references import check_references, read_references
from opensora.request import PARTS, SPATIAL_FACTOR, Request, Size, check_supported, make_requests, make_size
from opensora.settings import InferenceSettings
from opensora.weights import Summary

logger = logging.getLogger("opensora")


class Output(NamedTuple):
    """A result: where it lies, its frames uint8 [T, H, W, 3], and the preview's path if one was asked for."""

    path: Path
    frames: np.ndarray
    preview: Path | None = None


class _Enough(Exception):
    """Ends a rehearsal."""


class VideoPipeline:
    """Makes the videos of an inference request.

    What can be refused is refused on construction or, where the checkpoints' own configurations decide, before any
    weight is read. Every sample is denoised by itself, from noise keyed by (seed, number of the sample of its prompt,
    loop): its bits do not depend on the batch size, on the other prompts or on its place among them.
    """

    def __init__(self, settings: InferenceSettings) -> None:
        self.settings = settings
        check_supported(settings)
        self.size = make_size(settings)
        self.device = pick_device(settings.device)
        self.dtype = inference_dtype(self.device, settings.dtype)
        self.scheduler = registry.build(settings.scheduler)
        told = "PixArtMS" if settings.model["type"].startswith("PixArtMS") else "STDiT2"
        kind, size = settings.multi_resolution or told, self.size
        self.conditioning = size_conditioning(kind, 1, size[1:], size.num_frames, settings.fps, device=self.device)
        self.made = (size.height // SPATIAL_FACTOR * SPATIAL_FACTOR, size.width // SPATIAL_FACTOR * SPATIAL_FACTOR)
        watermark.check(settings.watermark, self.made)
        self.requests = make_requests(settings)
        _check_can_keep_frames(settings, self.scheduler, self.requests)
        self.align = settings.align
        self.reference_frames = {one.reference_path: check_references(one.reference_path) for one in self.requests}
        check_references(";".join(wishes.sources(settings)))
        self.summaries: dict[str, Summary] = {}
        self.read_frames: dict[str | None, list[int]] = {}
        self.timelines: dict[Request, list[Clip]] = {}
        self.seconds: dict[str, float] = {}  # that each stage has taken
        self.overlap = 0  # frames that each clip takes over from the one before

    def generate(self) -> Iterator[Output]:
        """Makes and writes the results one after the other.

        With `prompt_as_path`, those that exist are kept. All weights are located before any is read.
        """
        if not self.requests:
            raise ConfigError("there is no prompt: give one, or --prompt-path with a file of prompts")
        wanted = [request for request in self.requests if not self.exists(request)]
        if not wanted:
            return
        with output_folder(self.settings.save_dir):
            parts = self.build()
            wanted = self.check(self.refine(wanted), parts)
            asked = (self.size.height, self.size.width)
            if self.made != asked:
                logger.info("frames of %dx%d are made for %dx%d: sides are multiples of 8", *self.made, *asked)
            texts = self.encode_texts(parts.pop("text_encoder"), [text for one in wanted for text in self.texts(one)])
            vae, model = (self.fill(name, parts.pop(name)) for name in ("vae", "model"))
            _tell_untrained(self.size, components.trained_sizes(self.paths["model"]))
            for request in wanted:
                with _memory_advice(self.size):
                    frames = self.make(model, vae, texts, request)
                yield self._write(request, frames)
            self._remember(model, vae, texts, len(wanted) * self.settings.loop)

    def texts(self, request: Request) -> list[str]:
        """The text of each loop."""
        return [text_of_loop(request.encoded, loop) for loop in range(self.settings.loop)]

    def build(self) -> dict[str, Any]:
        """The text encoder, autoencoder and model without their weights, which are located and checked to fit."""
        settings = self.settings
        self.paths = {part: components.find(getattr(settings, part), part, settings.offline) for part in PARTS}
        text_encoder = components.build_text_encoder(settings.text_encoder, self.paths["text_encoder"], self.dtype)
        vae = components.build(settings.vae, self.paths["vae"])
        defaults = {"in_channels": vae.out_channels}
        if not isinstance(text_encoder, ClassIds):
            defaults |= {"caption_channels": text_encoder.output_dim, "model_max_length": text_encoder.model_max_length}
        size = {"input_size": tuple(vae.get_latent_size(self.size))}
        model = components.build(settings.model, self.paths["model"], defaults, size)
        _check_fit(model, vae, text_encoder)
        return {"text_encoder": text_encoder, "vae": vae, "model": model}

    def refine(self, requests: Sequence[Request]) -> list[Request]:
        """The requests in the words of the language model, if one is to refine them; it is asked once for each text."""
        if refine.is_wanted(self.settings):
            where, texts = refine.endpoint(self.settings), [text for one in requests for text in one.texts]
            refined = refine.refine_texts(texts, where)
            self.settings = dataclasses.replace(self.settings, refined=refined, llm_model=where[1])
        return [one.refined(self.settings) for one in requests] if self.settings.refined else list(requests)

    def encode_texts(self, encoder: Any, texts: list[str]) -> dict[str, Tensor]:
        """What the model is told of each text: features [1, 1, L, C] at its real length, or a class [1]."""
        keep_allocations_in_heap()
        if path := self.paths["text_encoder"]:
            filled = components.fill_text_encoder(encoder, self.settings.text_encoder, path, self.device)
            self._tell_loaded("text_encoder", filled)
        told = {text: encoder.encode([text])[0].to(self.device) for text in dict.fromkeys(texts)}
        return {text: value.to(self.dtype) if value.is_floating_point() else value for text, value in told.items()}

    def fill(self, part: str, built: Any) -> Any:
        """The autoencoder or the model with its weights, ready to run."""
        section = getattr(self.settings, part)
        self._tell_loaded(part, components.fill(built, section, self.paths[part], self.device, self.dtype))
        return built

    def _tell_loaded(self, part: str, summary: Summary) -> None:
        self.summaries[part] = summary
        logger.info("%-13s %s", part.replace("_", " "), summary)

    def check(self, requests: Sequence[Request], parts: Mapping[str, Any]) -> list[Request]:
        """The requests with all that they are given, once nothing can be refused any more but the weights themselves.

        Raises ConfigError or MediaError.
        """
        model, vae = parts["model"], parts["vae"]
        requests = self.with_conditions(requests, vae)
        self.check_conditions(requests, model, vae)
        if (encoder := parts["text_encoder"]) is not None:
            for text in dict.fromkeys(text for one in requests for text in self.texts(one)):
                _check_length(count_tokens(encoder, text), model.config)
        self.rehearse(model, tuple(vae.get_latent_size(self.size)))
        return requests

    def rehearse(self, model: Any, latent: tuple[int, ...]) -> None:
        """Raises ConfigError when the model cannot take what it will be told, or the sampler what the model gives.

        The model runs once without numbers, the sampler for two steps on a single value.
        """
        taken = 0

        def stand_in(x: Tensor, timestep: Tensor, **_: Any) -> Tensor:
            nonlocal taken
            taken += 1
            if taken > 2:
                raise _Enough
            return x.new_zeros(len(x), model.out_channels, *x.shape[2:])

        noise, options = torch.zeros(1, model.in_channels, 1, 1, 1), {"guidance_scale": 1.0}
        steps = [noise_generator(self.settings.seed, 0, 0)]
        try:
            self.scheduler.sample(stand_in, noise, {}, None, **self.size._asdict(), source=steps, **options)
        except _Enough:
            pass
        except ValueError as error:
            raise _config_error(f"scheduler '{self.settings.scheduler['type']}'", error) from error
        try:
            estimate.step(model, latent, self.conditioning, 1, self.dtype, self.device, batch=1)()
        except ValueError as error:
            raise _config_error(f"model '{self.settings.model['type']}'", error) from error

    def with_conditions(self, requests: Sequence[Request], vae: Any) -> list[Request]:
        """The requests with the references and mask strategy that the words of the settings mean for these clips."""
        if not wishes.sources(self.settings):
            return list(requests)
        if twice := [one.prompt for one in requests if one.reference_path or one.mask_strategy]:
            raise ConfigError(f"prompt {twice[0]!r} brings its own references; leave out {', '.join(wishes.NAMES)}")
        latent_frames = vae.get_latent_size(self.size)[0]
        given = wishes.conditions(self.settings, self.size.num_frames, latent_frames, vae.group)
        self.align = given.align
        self.reference_frames[given.reference_path] = check_references(given.reference_path)
        named = {"reference_path": given.reference_path, "mask_strategy": given.mask_strategy}
        return [request._replace(**named) for request in requests]

    def check_conditions(self, requests: Sequence[Request], model: Any, vae: Any) -> None:
        """Raises ConfigError for mask strategies or loops that do not fit the clips of these parts."""
        settings, frames = self.settings, vae.get_latent_size(self.size)[0]
        self.overlap = overlapping_frames(vae, self.size.num_frames, settings) if settings.loop > 1 else 0
        carried = (settings.condition_frame_length, settings.condition_frame_edit)
        for request in requests:
            counts = [vae.get_latent_size((n, None, None))[0] for n in self.count_frames(request.reference_path)]
            placements = parse_mask_strategy(request.mask_strategy)
            self.timelines[request] = timeline(placements, counts, frames, settings.loop, self.align, carried)
            if (placements or settings.loop > 1) and model.patch_size[0] > 1:
                raise ConfigError(f"model '{settings.model['type']}' sees frames in pairs and cannot keep single ones")
            if counts and not placements:
                logger.warning("references without a mask_strategy take no part: %s", request.reference_path)

    def count_frames(self, reference_path: str | None) -> list[int]:
        """The frames of each reference, which is read at the size that is made to be sure that it can be."""
        if reference_path not in self.read_frames:
            self.read_frames[reference_path] = [one.shape[1] for one in read_references(reference_path, self.made)]
        return self.read_frames[reference_path]

    @torch.no_grad()
    def make(self, model: Any, vae: Any, texts: Mapping[str, Tensor], request: Request) -> np.ndarray:
        """The frames uint8 [T, H, W, 3] of a request: its loops joined, each of which continues the one before."""
        settings, seed, frames = self.settings, self.settings.seed, []
        references = [self.encode(vae, one) for one in read_references(request.reference_path, self.made)]
        shape = (vae.out_channels, *vae.get_latent_size(self.size))
        for loop, (text, given) in enumerate(zip(self.texts(request), self.timelines[request], strict=True)):
            noise = initial_noise(seed, request.sample, loop, shape)
            latents, edit = place(noise, references, given.placements, loop)
            steps = noise_generator(seed, request.sample, loop)
            clip = self.make_clip(model, vae, texts[text], latents, edit, steps)
            frames.append(video.to_uint8(clip)[self.overlap if loop else 0 :])
            if loop + 1 < settings.loop:
                references.append(self.encode(vae, clip))
        return np.concatenate(frames)

    def make_clip(
        self, model: Any, vae: Any, text: Tensor, latents: Tensor, edit: Tensor, steps: torch.Generator
    ) -> Tensor:
        """One clip [3, T, H, W] in about [-1, 1] from noise and references [C, T', H, W] and their `edit` [T']."""
        cond, size = {"y": text, **self.conditioning}, self.size._asdict()
        null = None if self.scheduler.cfg_scale == 1 else {"y": model.null_caption(text)}
        options = {"edit": edit[None], "source": [steps], "progress": self.settings.verbose > 0}
        with self._timed("sampling"):
            sampled = self.scheduler.sample(model, latents[None].to(self.device), cond, null, **size, **options)
        with self._timed("decoding"):
            return vae.decode(sampled.to(self.dtype), num_frames=self.size.num_frames)[0].float()

    def encode(self, vae: Any, frames: Tensor) -> Tensor:
        """The latents [C, T', H, W] of frames [3, T, H, W] in [-1, 1]."""
        return vae.encode(frames[None].to(self.device, self.dtype), sample=False)[0].float().cpu()

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        estimate.wait(self.device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin

    def _remember(self, model: Any, vae: Any, texts: Mapping[str, Tensor], clips: int) -> None:
        """Notes the pace of this device for later plans, after a run that was long enough to tell."""
        if max(self.seconds.values()) < estimate.LONG_ENOUGH:
            return
        latent, where = tuple(vae.get_latent_size(self.size)), (self.dtype, self.device)
        tokens = max(text.shape[2] if text.ndim == 4 else 1 for text in texts.values())
        batch, steps = 1 if self.scheduler.cfg_scale == 1 else 2, self.scheduler.num_sampling_steps or 1
        step = estimate.step(model, latent, self.conditioning, tokens, *where, batch)
        costs = {
            "sampling": estimate.count(step, self.device).times(steps),
            "decoding": estimate.decoding(vae, self.size, *where),
        }
        for stage, cost in costs.items():
            estimate.remember(self.device, stage, cost.times(clips), self.seconds[stage])

    def exists(self, request: Request) -> bool:
        """Whether a result is there already and will be kept."""
        path = Path(f"{request.path}.{'png' if self.size.num_frames == 1 else 'mp4'}")
        exists = self.settings.prompt_as_path and path.is_file()
        if exists:
            logger.info("%s exists and is kept", path)
        return exists

    def _write(self, request: Request, frames: np.ndarray) -> Output:
        frames = watermark.draw(frames, self.settings.watermark)
        settings = dataclasses.asdict(self.settings)
        settings |= {"align": self.align, **dict.fromkeys((*wishes.NAMES, "llm_base_url"))}
        settings["watermark"] = watermark.text_of(settings["watermark"]) or False
        if refined := settings["refined"]:
            settings["refined"] = {text: refined[text] for text in request.texts}
        for name in ("reference_path", "mask_strategy"):
            settings[name] = [getattr(request, name)] if getattr(request, name) else None
        weights = {part: summary.sha256 for part, summary in self.summaries.items()}
        recipe = make_recipe(
            request.prompt, self.texts(request), settings["seed"], request.sample, settings=settings, weights=weights
        )
        path = write_output(frames, request.path, self.settings.output_fps, recipe)
        if not self.settings.preview:
            return Output(path, frames)
        return Output(path, frames, video.write_image(video.contact_sheet(frames), f"{request.path}.preview.png"))


def _check_can_keep_frames(settings: InferenceSettings, scheduler: Any, requests: Sequence[Request]) -> None:
    """Raises ConfigError when frames are given to a sampler or a model that would not keep them."""
    given = wishes.sources(settings) or any(request.mask_strategy for request in requests)
    if settings.loop == 1 and not given:
        return
    if not scheduler.takes_edit:
        raise ConfigError(f"scheduler '{settings.scheduler['type']}' cannot keep given frames; use rflow or iddpm")
    if "x_mask" not in inspect.signature(registry.builder(settings.model["type"]).forward).parameters:
        raise ConfigError(f"model '{settings.model['type']}' cannot keep given frames; use STDiT, STDiT2 or STDiT3")


def _check_fit(model: Any, vae: Any, text_encoder: Any) -> None:
    """Raises ConfigError when the parts do not fit together."""
    channels, told = model.config["caption_channels"], model.config.get("condition", "text")
    if model.in_channels != vae.out_channels:
        made = vae.out_channels
        raise ConfigError(f"the model takes {model.in_channels} latent channels, but the autoencoder makes {made}")
    if isinstance(text_encoder, ClassIds):
        if told != f"label_{text_encoder.num_classes}":
            raise ConfigError(f"the model's condition is '{told}', but prompts are {text_encoder.num_classes} classes")
    elif told != "text":
        raise ConfigError(f"the model's condition is '{told}'; it needs text_encoder = dict(type='classes', ...)")
    elif channels != (made := text_encoder.output_dim):
        raise ConfigError(f"the model takes {channels} text channels, but the text encoder makes {made}")


def overlapping_frames(vae: Any, num_frames: int, settings: InferenceSettings) -> int:
    """Frames that each loop takes over from the one before. Raises ConfigError where loops cannot be joined."""
    latent_frames, length = vae.get_latent_size((num_frames, None, None))[0], settings.condition_frame_length
    if not 0 < length < latent_frames:
        raise ConfigError(f"condition_frame_length is {length}; a clip has {latent_frames} latent frames, take fewer")
    try:
        vae.get_pixel_frames(latent_frames)
        return vae.get_pixel_frames(length)
    except ValueError as error:
        raise ConfigError(f"loop {settings.loop} with condition_frame_length {length}: {error}") from error


def _config_error(place: str, error: ValueError) -> ConfigError:
    return error if isinstance(error, ConfigError) else ConfigError(f"{place}: {error}")


def count_tokens(encoder: Any, text: str) -> int:
    """How many features a text becomes; no weights are needed. Raises ConfigError for a text that is no class."""
    if isinstance(encoder, T5Encoder):
        found = encoder.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        return min(len(found), encoder.model_max_length)
    if isinstance(encoder, ClassIds):
        encoder.encode([text])
    return 1


def _check_length(tokens: int, config: dict[str, Any]) -> None:
    """Raises ConfigError when a text has more tokens than a model of this configuration takes."""
    longest = config["model_max_length"]
    if tokens > longest:
        remedy = f"shorten it, or cut it with --cfg-options text_encoder.model_max_length={longest}"
        raise ConfigError(f"a prompt has {tokens} tokens, but the model takes {longest}; {remedy}")


def _tell_untrained(size: Size, trained: list[list[int]]) -> None:
    """Warns where the model's own record of what it was trained on does not list the size asked for."""
    if trained and list(size) not in trained:
        known = ", ".join(str(Size(*one)) for one in trained)
        logger.warning("this model was trained on %s: expect noise at %s", known, size)


@contextmanager
def output_folder(path: str) -> Iterator[None]:
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
