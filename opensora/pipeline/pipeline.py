"""From a request to files: check, encode the text, sample latents, decode, write each result with its recipe."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opensora import registry
from opensora.acceleration.cuda_graphs import Recorded
from opensora.acceleration.device import check_graphs, inference_dtype, keep_allocations_in_heap, pick_device
from opensora.acceleration.memory_plan import BY_NAME, FAST, LOW, MemoryPlan, Weights
from opensora.acceleration.step_cache import cached_sampling
from opensora.checkpoints import builder
from opensora.checkpoints.summary import Summary
from opensora.config.settings import InferenceSettings
from opensora.datasets import video
from opensora.distributed.fsdp import one_voice, share, start, world_size
from opensora.distributed.parallelize import compile_blocks
from opensora.distributed.sequence_parallel import check_divisible, check_guidance_ranks, guidance_parallel
from opensora.errors import ConfigError, WeightsError
from opensora.models.sizes import size_conditioning
from opensora.models.text_encoder.classes import ClassIds
from opensora.pipeline import draft, media_conditions, prompt_refiner, step_cache, watermark
from opensora.pipeline.mask_strategy import Clip, parse_mask_strategy, place, timeline
from opensora.pipeline.noise import initial_noise, noise_generator
from opensora.pipeline.outputs import Output, Outputs, output_folder
from opensora.pipeline.prompts import text_of_loop
from opensora.pipeline.recipe import Recipe, make_recipe
from opensora.pipeline.references import References, urls
from opensora.pipeline.request import PARTS, Request, Size, check_supported, make_requests, make_size, negative_text
from opensora.pipeline.stage_costs import Needs, count_tokens
from opensora.profiling import cost_model
from opensora.schedulers.common import Pause

logger = logging.getLogger("opensora")

HELD_TEXTS = 256  # encoded texts that are held: of T5-XXL, each takes up to 2.5 MB


class _Clip(NamedTuple):
    """A clip as levels uint8 [T, H, W, 3] and, where another one goes on from it, as video [3, T, H, W] in [-1, 1]."""

    frames: np.ndarray
    video: Tensor | None


class _Enough(Exception):
    """Ends a rehearsal."""


class VideoPipeline:
    """Makes the videos of an inference request.

    What can be refused is refused on construction or, where the checkpoints' own configurations decide, before any
    weight is read. Every sample is denoised by itself, from noise keyed by (seed, number of the sample of its prompt,
    loop): its bits do not depend on the batch size, on the other prompts or on its place among them. Under torchrun
    each sample is denoised by all ranks together, with guidance each half of it by half of them if they are even, and
    the main rank alone decodes and writes it.
    """

    @one_voice()
    def __init__(self, settings: InferenceSettings) -> None:
        self.settings = settings
        check_supported(settings)
        self.size = make_size(settings)
        self.device = pick_device(settings.device)
        self.layout = start(self.device, world_size())
        check_guidance_ranks(settings.guidance_ranks, self.layout)
        self.dtype = inference_dtype(self.device, settings.dtype, settings.cpu_dtype)
        step_cache.try_choices(settings, self.device, self.dtype)
        if settings.graphs and self.layout.world_size > 1:
            raise ConfigError("graphs are recorded on a single device; leave --graphs out under torchrun")
        if settings.graphs:
            check_graphs(self.device)
        self.scheduler = registry.build(settings.scheduler)
        self.cache = step_cache.asked(settings)
        self._use_memory(BY_NAME.get(settings.memory, FAST))  # "auto" is decided once the parts are known
        self.stop = draft.steps_to_take(settings, self.scheduler)
        told = "PixArtMS" if settings.model["type"].startswith("PixArtMS") else "STDiT2"
        kind, size = settings.multi_resolution or told, self.size
        self.conditioning = size_conditioning(kind, 1, size[1:], size.num_frames, settings.fps, device=self.device)
        self.made = size.made[1:]
        watermark.check(settings.watermark, self.made)
        self.outputs = Outputs(settings, self.size.num_frames, bool(self.stop))
        self.requests = self.outputs.place(make_requests(settings))
        _check_addresses(settings, self.requests)
        self.negative_text = negative_text(settings)
        if self.negative_text is not None and self.scheduler.cfg_scale == 1:
            logger.warning("negative_prompt has no effect: at cfg_scale 1 nothing is guided")
            self.negative_text = None
        self.negative: Tensor | None = None  # the same, encoded
        _check_can_keep_frames(settings, self.scheduler, self.requests)
        self.align = settings.align
        self.references = References(self.made, offline=settings.offline)
        for path in dict.fromkeys(
            [*(one.reference_path for one in self.requests), ";".join(media_conditions.sources(settings))]
        ):
            self.references.check(path)
        self.reference_hashes: dict[str | None, dict[str, str]] = {}
        self.drafts: dict[str, draft.Draft] = {}  # path of a request -> from where it goes on
        self.stopped: dict[str, Pause] = {}  # path of a request -> where it has stopped
        self.summaries: dict[str, Summary] = {}
        self.tokenizer: dict[str, str] = {}  # its hash, once it is built
        self.timelines: dict[Request, list[Clip]] = {}
        self.seconds: dict[str, float] = {}  # that each stage has taken
        self.overlap = 0  # frames that each clip takes over from the one before

    def generate(self) -> Iterator[Output]:
        """Makes and writes the results one after the other.

        With `prompt_as_path`, those that exist are kept. All weights are located before any is read.
        """
        if not self.requests:
            raise ConfigError("there is no prompt: give one, or --prompt-path with a file of prompts")
        wanted = share([request for request in self.requests if not self.exists(request)], self.layout)
        if not wanted:
            return
        main = self.layout.is_main
        with one_voice(), output_folder(self.outputs.folder) if main else nullcontext():
            if main:
                self.outputs.check([request.path for request in wanted])
            parts = self.build()
            check_divisible(parts["model"], self.layout)
            wanted = self.check(self.refine(wanted), parts)
            self.choose_memory(wanted, parts)
            if self.size.rounding:
                logger.info("%s", self.size.rounding)
            portions = self.portions(wanted)
            told = [*self.texts_of(portions[0]), *step_cache.prompts(self.settings)]
            texts = self.encode_texts(parts.pop("text_encoder"), told)
            vae, model = (self.fill(name, parts.pop(name)) for name in ("vae", "model"))
            model = self.accelerated(model)
            _tell_untrained(self.size, builder.trained_sizes(self.paths["model"]))
            self._check_drafts(wanted, (vae.out_channels, *vae.get_latent_size(self.size)))
            self.cache = step_cache.tuned(self, model, (vae.out_channels, *vae.get_latent_size(self.size)), texts)
            if self.stop:
                logger.info("drafts stop after %d of %d steps", self.stop, self.scheduler.num_steps)
            for number, portion in enumerate(portions):
                if number:
                    texts.clear()
                    texts = self.encode_again(portion)
                for request in portion:
                    with _memory_advice(self.size, self.memory):
                        frames = self.make(model, vae, texts, request)
                        if self.settings.cache_psnr and not self.cache.is_exact:
                            self._compare(frames, model, vae, texts, request)
                    if main:
                        yield self._write(request, frames)
            self._remember(model, vae, texts, len(wanted) * self.settings.loop)

    def choose_memory(self, requests: Sequence[Request], parts: Mapping[str, Any]) -> Needs:
        """What checked requests need; the memory plan that was asked for or that fits is used from now on."""
        needs = Needs(self, parts, requests)
        self._use_memory(share(needs.choose(), self.layout))
        return needs

    def accelerated(self, model: Any) -> Any:
        """The model as it is called: compiled, divided among ranks, recorded, as the settings ask."""
        self._compile(model)
        return self._recorded(guidance_parallel(model, self.layout, self.settings.guidance_ranks))

    def _compile(self, model: Any) -> None:
        """Compiles the model, if the settings ask for it."""
        if self.settings.compile and self.memory.in_parts:
            logger.warning("nothing is compiled: --memory %s cuts blocks into parts", self.memory.name)
        elif self.settings.compile:
            compile_blocks(model)

    def _recorded(self, model: Any) -> Any:
        """The model, its evaluations recorded and replayed if the settings ask for it."""
        if self.settings.graphs and self.memory.visiting:
            logger.warning("nothing is recorded: --memory %s moves the weights", self.memory.name)
        elif self.settings.graphs:
            return Recorded(model)
        return model

    def _use_memory(self, plan: MemoryPlan) -> None:
        self.memory, self.weights = plan, Weights(plan, self.device)

    def _check_drafts(self, requests: Sequence[Request], shape: tuple[int, ...]) -> None:
        """Raises ConfigError or WeightsError for a draft that is not one of these requests, parts and references."""
        for request in requests:
            if begun := self.drafts.get(request.path):
                draft.check_sampler(begun, self.scheduler.num_steps, shape)
                draft.check_same(begun, self.recipe(request))

    def texts(self, request: Request) -> list[str]:
        """The text of each loop."""
        return [text_of_loop(request.encoded, loop) for loop in range(self.settings.loop)]

    def texts_of(self, requests: Sequence[Request]) -> list[str]:
        """Each text of these requests once."""
        return list(dict.fromkeys(text for one in requests for text in self.texts(one)))

    def portions(self, requests: Sequence[Request]) -> list[list[Request]]:
        """The requests in turn, in lists of which each has at most `HELD_TEXTS` texts, or is of one request."""
        portions: list[list[Request]] = []
        held: set[str] = set()
        for one in requests:
            texts = set(self.texts(one))
            if not portions or len(held | texts) > HELD_TEXTS:
                portions.append([])
                held = set()
            portions[-1].append(one)
            held |= texts
        return portions

    def build(self) -> dict[str, Any]:
        """The text encoder, autoencoder and model without their weights, which are located and checked to fit."""
        settings = self.settings
        self.paths = {part: builder.find_weights(getattr(settings, part), part, settings.offline) for part in PARTS}
        text_encoder = builder.build_text_encoder(settings.text_encoder, self.paths["text_encoder"], self.dtype)
        self.tokenizer = builder.tokenizer_sha256(self.paths["text_encoder"])
        vae = builder.build_model(settings.vae, self.paths["vae"])
        defaults = {"in_channels": vae.out_channels}
        if not isinstance(text_encoder, ClassIds):
            defaults |= {"caption_channels": text_encoder.output_dim, "model_max_length": text_encoder.model_max_length}
        size = {"input_size": tuple(vae.get_latent_size(self.size))}
        model = builder.build_model(settings.model, self.paths["model"], defaults, size)
        _check_fit(model, vae, text_encoder)
        return {"text_encoder": text_encoder, "vae": vae, "model": model}

    def refine(self, requests: Sequence[Request]) -> list[Request]:
        """The requests in the words of the language model, if one is to refine them; it is asked once for each text."""
        if prompt_refiner.is_wanted(self.settings):
            where, texts = prompt_refiner.endpoint(self.settings), [text for one in requests for text in one.texts]
            refined = share(prompt_refiner.refine_texts(texts, where) if self.layout.is_main else {}, self.layout)
            self.settings = dataclasses.replace(self.settings, refined=refined, llm_model=where[1])
        return [one.refined(self.settings) for one in requests] if self.settings.refined else list(requests)

    def encode_texts(self, encoder: Any, texts: list[str]) -> dict[str, Tensor]:
        """What the model is told of each text: features [1, 1, L, C] at its real length, or a class [1].

        The negative prompt, if there is one, is encoded with them.
        """
        keep_allocations_in_heap()
        if path := self.paths["text_encoder"]:
            where = (self.device, self.layout, self.weights.put_text_encoder)
            filled = builder.load_text_encoder_weights(encoder, self.settings.text_encoder, path, *where)
            self._tell_loaded("text_encoder", filled)
        told: dict[str, Tensor] = {}
        for text in dict.fromkeys(texts if self.negative_text is None else [*texts, self.negative_text]):
            value = encoder.encode([text])[0].to(self.device)
            told[text] = value.to(self.dtype) if value.is_floating_point() else value
        self.negative = told.get(self.negative_text)
        return told

    def encode_again(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        """`encode_texts` of further requests, with the text encoder read a second time. Raises WeightsError."""
        before = self.summaries.get("text_encoder")
        section, path = self.settings.text_encoder, self.paths["text_encoder"]
        encoder = builder.build_text_encoder(section, path, self.dtype)
        texts = self.encode_texts(encoder, self.texts_of(requests))
        if before and self.summaries["text_encoder"].sha256 != before.sha256:
            raise WeightsError(f"{path}: has changed since the first prompts were encoded with it; start again")
        return texts

    def fill(self, part: str, built: Any) -> Any:
        """The autoencoder or the model with its weights, ready to run."""
        section = getattr(self.settings, part)
        linear = self.settings.linear if part == "model" else "exact"
        self._tell_loaded(
            part, builder.load_model_weights(built, section, self.paths[part], self.device, self.dtype, linear)
        )
        (self.memory.arrange if part == "model" else self.memory.arrange_vae)(built)
        self.weights.settle(part, built)
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
            for text in self.texts_of(requests):
                _check_length(count_tokens(encoder, text), model.config)
            if self.negative_text is not None:
                _check_length(count_tokens(encoder, self.negative_text), model.config, "negative_prompt")
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
            cost_model.step(model, latent, self.conditioning, 1, self.dtype, self.device, batch=1)()
        except ValueError as error:
            raise _config_error(f"model '{self.settings.model['type']}'", error) from error

    def with_conditions(self, requests: Sequence[Request], vae: Any) -> list[Request]:
        """The requests with the references and mask strategy that the words of the settings mean for these clips."""
        if not media_conditions.sources(self.settings):
            return list(requests)
        if twice := [one.prompt for one in requests if one.reference_path or one.mask_strategy]:
            raise ConfigError(
                f"prompt {twice[0]!r} brings its own references; leave out {', '.join(media_conditions.NAMES)}"
            )
        latent_frames = vae.get_latent_size(self.size)[0]
        given = media_conditions.conditions(self.settings, self.size.num_frames, latent_frames, vae.group)
        self.align = given.align
        self.references.check(given.reference_path)
        named = {"reference_path": given.reference_path, "mask_strategy": given.mask_strategy}
        return [request._replace(**named) for request in requests]

    def check_conditions(self, requests: Sequence[Request], model: Any, vae: Any) -> None:
        """Raises ConfigError for mask strategies or loops that do not fit the clips of these parts."""
        settings, frames = self.settings, vae.get_latent_size(self.size)[0]
        self.overlap = overlapping_frames(vae, self.size.num_frames, settings) if settings.loop > 1 else 0
        carried = (settings.condition_frame_length, settings.condition_frame_edit)
        for request in requests:
            if request.reference_path not in self.reference_hashes:
                self.reference_hashes[request.reference_path] = self.references.hashes(request.reference_path)
            counts = [vae.get_latent_size((n, None, None))[0] for n in self.count_frames(request.reference_path)]
            placements = parse_mask_strategy(request.mask_strategy)
            self.timelines[request] = timeline(placements, counts, frames, settings.loop, self.align, carried)
            if (placements or settings.loop > 1) and model.patch_size[0] > 1:
                raise ConfigError(f"model '{settings.model['type']}' sees frames in pairs and cannot keep single ones")
            if counts and not placements:
                logger.warning("references without a mask_strategy take no part: %s", request.reference_path)

    def count_frames(self, reference_path: str | None) -> list[int]:
        """The frames of each reference, which has been read at the size that is made to be sure that it can be."""
        return self.references.counts(reference_path)

    @torch.inference_mode()  # in which small operations cost less than without gradients alone
    def make(self, model: Any, vae: Any, texts: Mapping[str, Tensor], request: Request) -> np.ndarray:
        """The frames uint8 [T, H, W, 3] of a request: its loops joined, each of which continues the one before.

        A draft ends with the first of them. There are no frames but on the main rank.
        """
        settings, seed, frames = self.settings, self.settings.seed, []
        references = [self.encode(vae, one) for one in self.references.read(request.reference_path)]
        shape = (vae.out_channels, *vae.get_latent_size(self.size))
        for loop, (text, given) in enumerate(zip(self.texts(request), self.timelines[request], strict=True)):
            noise = initial_noise(seed, request.sample, loop, shape)
            latents, edit = place(noise, references, given.placements, loop)
            steps, pause = noise_generator(seed, request.sample, loop), Pause()
            if loop == 0:
                begun = self.drafts.get(request.path)
                pause = draft.go_on(begun, steps) if begun else Pause(self.stop)
            latents = self.make_latents(model, texts[text], latents, edit, steps, pause)
            goes_on = loop + 1 < settings.loop and not self.stop
            clip = self.decode(vae, latents, goes_on) if self.layout.is_main else None
            if clip is not None:
                frames.append(clip.frames[self.overlap if loop else 0 :])
            if self.stop:
                self.stopped[request.path] = draft.stop(pause, steps)
                break
            if goes_on:
                references.append(share(None if clip is None else self.encode(vae, clip.video), self.layout))
        return frames[0] if len(frames) == 1 else np.concatenate(frames or [np.empty(0, np.uint8)])

    def _compare(self, frames: np.ndarray, *made_of: Any) -> None:
        """Says how far frames lie from those without the approximations."""
        cache, self.cache = self.cache, cached_sampling.Cache()
        exact = self.make(*made_of)
        self.cache = cache
        if self.layout.is_main:
            logger.info("PSNR against the uncached run: %.1f dB", step_cache.psnr(frames, exact))

    def make_latents(
        self, model: Any, text: Tensor, latents: Tensor, edit: Tensor, steps: torch.Generator, pause: Pause,
    ) -> Tensor:  # fmt: skip
        """The latents [1, C, T', H, W] of a clip from noise and references [C, T', H, W] and their `edit` [T']."""
        options = {"edit": edit[None], "source": [steps], "progress": self.settings.verbose > 0 and self.layout.is_main}
        options["pause"] = pause
        with self._timed("sampling"):
            return self.denoise(model, latents[None].to(self.device), text, self.cache, **options)

    def decode(self, vae: Any, latents: Tensor, goes_on: bool = False) -> _Clip:
        """The clip of latents [1, C, T', H, W], made in pieces, of which the device holds one at a time."""
        frames, kept, begin = np.empty((self.size.num_frames, *self.made, 3), np.uint8), [], 0
        with self._timed("decoding"), self.weights.using("vae"):
            for piece in vae.decoded(latents.to(self.dtype), num_frames=self.size.num_frames):
                end = begin + piece.shape[2]
                frames[begin:end], begin = video.to_uint8(piece[0]), end
                if goes_on:
                    kept.append(piece[0].cpu())
        return _Clip(frames, torch.cat(kept, dim=1) if goes_on else None)

    def denoise(self, model: Any, noise: Tensor, text: Tensor, cache: cached_sampling.Cache, **options: Any) -> Tensor:
        """Clean latents [1, C, T, H, W] of a text; `options` are those of the sampler and of `caching.sample`."""
        cond = {"y": text, **self.conditioning}
        null = None
        if self.scheduler.cfg_scale != 1:
            null = {"y": model.null_caption(text) if self.negative is None else self.negative}
        options |= self.size._asdict()
        with self.weights.using("model"):
            return cached_sampling.sample(self.scheduler, model, noise, cond, null, cache, **options)

    def encode(self, vae: Any, frames: Tensor) -> Tensor:
        """The latents [C, T', H, W] of frames [3, T, H, W] in [-1, 1]."""
        pieces = (piece.to(self.device, self.dtype) for piece in self.memory.pieces(frames[None]))
        with self.weights.using("vae"):
            return vae.encoded(pieces)[0].float().cpu()

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        cost_model.wait(self.device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin

    def _remember(self, model: Any, vae: Any, texts: Mapping[str, Tensor], clips: int) -> None:
        """Notes the pace of this device for later plans, after a run that was long enough to tell."""
        whole = not self.stop and not self.drafts and self.cache.is_exact and self.layout.world_size == 1
        if not whole or self.settings.compile or max(self.seconds.values()) < cost_model.LONG_ENOUGH:
            return
        latent, where = tuple(vae.get_latent_size(self.size)), (self.dtype, self.device)
        tokens = max(text.shape[2] if text.ndim == 4 else 1 for text in texts.values())
        batch = 1 if self.scheduler.cfg_scale == 1 else 2
        steps = self.scheduler.num_sampling_steps or self.scheduler.num_steps
        step = cost_model.step(model, latent, self.conditioning, tokens, *where, batch)
        costs = {
            "sampling": cost_model.count(step, self.device).times(steps),
            "decoding": cost_model.decoding(vae, self.size, *where),
        }
        for stage, cost in costs.items():
            cost_model.remember(self.device, stage, cost.times(clips), self.seconds[stage], self.dtype)

    def exists(self, request: Request) -> bool:
        """Whether a result is there already and will be kept."""
        return self.outputs.keeps(request.path)

    def _write(self, request: Request, frames: np.ndarray) -> Output:
        frames, recipe, save_state = watermark.draw(frames, self.settings.watermark), self.recipe(request), None
        if self.stop:
            whole = {**recipe, "settings": {**recipe["settings"], "draft": False, "steps_until": None}}
            pause, num_steps = self.stopped.pop(request.path), self.scheduler.num_steps
            save_state = partial(draft.save, recipe=whole, pause=pause, num_steps=num_steps, device=str(self.device))
            recipe["draft"] = {"steps": self.stop, "of": num_steps}
        return self.outputs.write(request.path, frames, recipe, save_state)

    def recipe(self, request: Request) -> Recipe:
        """How the result of a request is made, once everything is loaded; that of a draft stays as it was then."""
        begun = self.drafts.get(request.path)
        settings = begun.recipe["settings"] if begun else self._settings_of(request)
        return make_recipe(
            request.prompt, self.texts(request), settings["seed"], request.sample, settings=settings,
            weights={part: one.sha256 for part, one in self.summaries.items()} | self.tokenizer,
            references=self.reference_hashes[request.reference_path],
        )  # fmt: skip

    def _settings_of(self, request: Request) -> dict[str, Any]:
        """Every setting that a result depends on, with its own conditions and refined texts alone."""
        settings = dataclasses.asdict(self.settings)
        settings |= {
            "align": self.align,
            **dict.fromkeys((*media_conditions.NAMES, "llm_base_url")),
            "guidance_ranks": "auto",
        }
        settings["memory"] = self.memory.name
        settings["watermark"] = watermark.text_of(settings["watermark"]) or False
        if refined := settings["refined"]:
            settings["refined"] = {text: refined[text] for text in request.texts}
        for name in ("reference_path", "mask_strategy"):
            settings[name] = [getattr(request, name)] if getattr(request, name) else None
        return step_cache.recorded(settings, self.cache)


def _check_addresses(settings: InferenceSettings, requests: Sequence[Request]) -> None:
    """Raises ConfigError where a file of prompts names an address that nobody has allowed to ask."""
    if settings.prompt_path is None or settings.prompt or settings.allow_downloads:
        return
    given = {url for entry in settings.reference_path or () for url in urls(entry)}
    for request in requests:
        if named := [url for url in urls(request.reference_path) if url not in given]:
            problem = f"the prompts of {settings.prompt_path} name the address {named[0][:200]!r}"
            raise ConfigError(f"{problem}; --allow-downloads has it fetched, or download it and give its path")


def _check_can_keep_frames(settings: InferenceSettings, scheduler: Any, requests: Sequence[Request]) -> None:
    """Raises ConfigError when frames are given to a sampler or a model that would not keep them."""
    given = media_conditions.sources(settings) or any(request.mask_strategy for request in requests)
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
    """Frames that each loop takes over from the one before.

    Raises ConfigError where loops cannot be joined, which names the nearest setting with which they can.
    """
    length = settings.condition_frame_length
    if problem := _why_apart(vae, num_frames, length):
        raise ConfigError(f"loop {settings.loop}: {problem}; {_to_be_joined(vae, num_frames, length)}")
    return vae.get_pixel_frames(length)


def _why_apart(vae: Any, num_frames: int, length: int) -> str:
    """Why no clip of `num_frames` can go on from the last `length` latent frames of another; empty where it can."""
    latent_frames = vae.get_latent_size((num_frames, None, None))[0]
    if not 0 < length < latent_frames:
        clip = f"clips of {num_frames} frames have {latent_frames} latent frames"
        return f"condition_frame_length is {length}, but {clip}"
    try:
        vae.get_pixel_frames(latent_frames)
        vae.get_pixel_frames(length)
    except ValueError as error:
        return f"{num_frames} frames with condition_frame_length {length}: {error}"
    return ""


def _to_be_joined(vae: Any, num_frames: int, length: int) -> str:
    """What to give so that clips can be joined: another overlap, else the nearest other length, else both."""
    group, latents = vae.group
    lengths = sorted(range(1, vae.get_latent_size((num_frames, None, None))[0]), key=lambda one: abs(one - length))
    if found := next((one for one in lengths if not _why_apart(vae, num_frames, one)), None):
        return f"give --condition-frame-length {found}"
    most = max(num_frames, min(length, 10**4) * group // latents) + 2 * group
    counts = sorted(range(1, most + 1), key=lambda one: abs(one - num_frames))
    if found := next((one for one in counts if not _why_apart(vae, one, length)), None):
        return f"give --num-frames {found}"
    if found := next((one for one in counts if not _why_apart(vae, one, latents)), None):
        return f"give --num-frames {found} --condition-frame-length {latents}"
    return "give an autoencoder with vae.micro_frame_size: without, it joins no clips"


def _config_error(place: str, error: ValueError) -> ConfigError:
    return error if isinstance(error, ConfigError) else ConfigError(f"{place}: {error}")


def _check_length(tokens: int, config: dict[str, Any], what: str = "a prompt") -> None:
    """Raises ConfigError when a text has more tokens than a model of this configuration takes."""
    longest = config["model_max_length"]
    if tokens > longest:
        remedy = f"shorten it, or cut it with --cfg-options text_encoder.model_max_length={longest}"
        raise ConfigError(f"{what} has {tokens} tokens, but the model takes {longest}; {remedy}")


def _tell_untrained(size: Size, trained: list[list[int]]) -> None:
    """Warns where the model's own record of what it was trained on does not list the size that is made."""
    known = list(dict.fromkeys(Size(*one).made for one in trained))
    if known and size.made not in known:
        told = ", ".join(map(str, known))
        logger.warning("this model was trained on %s: expect noise at %s", told, size.made)


@contextmanager
def _memory_advice(size: Size, plan: MemoryPlan) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        remedy = "ask for a smaller size or fewer frames" + ("" if plan == LOW else ", but first try --memory low")
        raise ConfigError(f"memory does not suffice for {size}; {remedy}") from error
