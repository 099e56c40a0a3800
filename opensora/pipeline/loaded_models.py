"""The models of a pipeline: located, built, loaded, compiled and captured, always in this order.

Generation, plans, benchmarks, replay and drafts that continue all use `LoadedModels`. It does not depend on a prompt.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from opensora import registry
from opensora.acceleration.compile import compile_blocks
from opensora.acceleration.cuda_graphs import CapturedModel, check_graphs
from opensora.acceleration.device import pick_device, with_index
from opensora.acceleration.memory_plan import BY_NAME, FAST, MemoryPlan
from opensora.acceleration.offload import Offloader
from opensora.acceleration.precision import inference_dtype
from opensora.checkpoints import builder
from opensora.checkpoints.sections import check_section
from opensora.checkpoints.summary import Summary
from opensora.config.settings import InferenceSettings
from opensora.distributed.failures import report_first_failure
from opensora.distributed.guidance_parallel import check_guidance_ranks, guidance_parallel
from opensora.distributed.process_group import start
from opensora.distributed.ranks import world_size
from opensora.distributed.sequence_parallel import check_divisible
from opensora.errors import ConfigError, WeightsError
from opensora.models.layers.fixed_positions import FixedPositions
from opensora.models.text_encoder.classes import ClassIds
from opensora.pipeline import step_cache
from opensora.pipeline.adapters import Adapters
from opensora.pipeline.request import PARTS, Size

logger = logging.getLogger("opensora")


class Components(NamedTuple):
    """The models on the meta device, without weights. `text_encoder` is None if its files are not on this machine."""

    text_encoder: Any
    vae: Any
    model: Any


class LoadedModels:
    """Text encoder, autoencoder and diffusion model on one device. Each is loaded once and stays.

    Exceptions: the text encoder is freed after use unless it fits beside the others; models with position embeddings of
    a fixed size (1.0, PixArt, DiT, Latte) are loaded again for another latent size; and all models are loaded again
    under another memory plan.
    """

    @report_first_failure()
    def __init__(self, settings: InferenceSettings) -> None:
        """Checks the settings; reads no file. Raises ConfigError."""
        for part in PARTS:
            check_section(getattr(settings, part), part)
        self.settings = settings
        self.device = pick_device(settings.device)
        self.layout = start(self.device, world_size())
        self.device = with_index(self.device)
        check_guidance_ranks(settings.guidance_ranks, self.layout)
        self.dtype = inference_dtype(self.device, settings.dtype, settings.cpu_dtype)
        step_cache.warn_slow_options(settings, self.device, self.dtype)
        if settings.graphs and self.layout.world_size > 1:
            raise ConfigError("graphs are recorded on a single device; remove --graphs under torchrun")
        if settings.graphs:
            check_graphs(self.device)
        self.plan: MemoryPlan = BY_NAME.get(settings.memory, FAST)  # "auto" is decided by the first request
        self.paths: dict[str, Path | None] = {}
        self.summaries: dict[str, Summary] = {}
        self.tokenizer: dict[str, str] = {}  # "tokenizer" -> its SHA-256
        self.text_encoder: Any = None
        self.vae: Any = None
        self.model: Any = None  # the diffusion model
        self.denoiser: Any = None  # the diffusion model as the sampler calls it: compiled, split over ranks, captured
        self.same_bits: dict[Any, bool] = {}  # kind of batch -> whether it is computed with the bits of single requests
        self.adapters = Adapters()  # of the diffusion model
        self._unloaded: dict[str, Any] = {}  # part -> module without weights
        self._latent_size: tuple[int, ...] | None = None  # for which the unloaded diffusion model was built
        self._loaded_for: tuple[int, ...] | None = None  # for which the loaded diffusion model was built
        self._offloader = Offloader(self.plan.offload, self.device)

    # 1. locate

    def locate(self) -> None:
        """Finds the files of all weights, downloading them where allowed. Raises WeightsError."""
        absent = [part for part in PARTS if part not in self.paths]
        for part in absent:
            self.paths[part] = builder.find_weights(getattr(self.settings, part), part, self.settings.offline)
        if absent:  # models built before did not have the config files
            self._unloaded.clear()
        self.tokenizer = self.tokenizer or builder.tokenizer_sha256(self.paths["text_encoder"])

    def path(self, part: str) -> Path:
        """The located file or folder of the weights of a part."""
        path = self.paths[part]
        assert path is not None, part  # only class labels have no weights
        return path

    def locate_without_downloads(self) -> list[str]:
        """Finds the files on this machine; returns the parts that would be downloaded."""
        absent = []
        for part in PARTS:
            try:
                path = builder.find_weights(getattr(self.settings, part), part, offline=True)
            except WeightsError as error:
                if self.settings.offline or os.environ.get("HF_HUB_OFFLINE") or "(offline)" not in str(error):
                    raise  # not a hub id, or downloads are disabled
                absent.append(part)
            else:
                self.paths[part] = path
        return absent

    # 2. build

    def build(self, size: Size) -> Components:
        """The models without weights, for checks and estimates. Raises ConfigError where they do not fit together."""
        settings, unloaded = self.settings, self._unloaded
        if self.text_encoder is None and "text_encoder" not in unloaded:
            unloaded["text_encoder"] = self._build_text_encoder()
        if "vae" not in unloaded:
            unloaded["vae"] = builder.build_model(settings.section("vae"), self.paths.get("vae"))
        text_encoder, vae = self.text_encoder or unloaded["text_encoder"], unloaded["vae"]
        latent_size = tuple(vae.get_latent_size(size))
        located = text_encoder is not None and "model" in self.paths  # else the model is the published one of its type
        if "model" not in unloaded or self._needs_rebuild(latent_size, self._latent_size):
            defaults: dict[str, Any] = {"in_channels": vae.out_channels}
            if located and not isinstance(text_encoder, ClassIds):
                defaults["caption_channels"] = text_encoder.output_dim
                defaults["model_max_length"] = text_encoder.model_max_length
            forced = {"input_size": latent_size}
            unloaded["model"] = builder.build_model(settings.model, self.paths.get("model"), defaults, forced)
            self._latent_size = latent_size
        model = unloaded["model"]
        if located:
            check_fit(model, vae, text_encoder)
        check_divisible(model, self.layout)
        return Components(text_encoder, vae, model)

    def _build_text_encoder(self) -> Any:
        if "text_encoder" not in self.paths:
            return None
        return builder.build_text_encoder(self.settings.section("text_encoder"), self.paths["text_encoder"], self.dtype)

    def _needs_rebuild(self, latent_size: tuple[int, ...], built_for: tuple[int, ...] | None) -> bool:
        """Whether a model that was built for another latent size cannot take this one."""
        return built_for != latent_size and issubclass(registry.builder(self.settings.model["type"]), FixedPositions)

    # 3. load

    def use_plan(self, plan: MemoryPlan) -> None:
        """Sets the memory plan; models that were loaded under another plan are unloaded."""
        if plan != self.plan:
            self.unload()
        self.plan = plan
        if self.model is None:
            self._offloader = Offloader(plan.offload, self.device)

    def unload(self) -> None:
        """Frees all weights; the next request loads them again."""
        self.text_encoder = self.vae = self.model = self.denoiser = None
        self.same_bits.clear()
        self._offloader = Offloader(self.plan.offload, self.device)

    def load_text_encoder(self) -> Any:
        """The text encoder with its weights. Raises WeightsError where its files have changed since it was read."""
        if self.text_encoder is not None:
            return self.text_encoder
        encoder = self._unloaded.pop("text_encoder", None) or self._build_text_encoder()
        if path := self.paths["text_encoder"]:
            where = (self.device, self.layout, self._offloader.enabled)
            before = self.summaries.get("text_encoder")
            summary = builder.load_text_encoder_weights(encoder, self.settings.section("text_encoder"), path, *where)
            self._record_summary("text_encoder", summary)
            if before and summary.sha256 != before.sha256:
                raise WeightsError(f"{path}: has changed since the first prompts were encoded with it; start again")
        self.text_encoder = encoder
        return encoder

    def drop_text_encoder(self) -> None:
        """Frees the text encoder; encoding more prompts loads it again."""
        self.text_encoder = None

    def load(self, size: Size) -> None:
        """Reads the autoencoder and the diffusion model, unless they are loaded for this size."""
        if not self._needs_loading(size):
            return
        self.build(size)
        if self.vae is None:
            self.vae = self._load_weights("vae", self._unloaded.pop("vae"))
            self._offloader.offload("vae", self.vae)
        self.denoiser = self.model = None  # freed before the next one is loaded
        model = self._load_weights("model", self._unloaded.pop("model"), self.settings.linear)
        self.plan.prepare_model(model)
        self._offloader.offload("model", model)
        self.model, self._loaded_for = model, self._latent_size
        self.denoiser = self._accelerated(model)

    def use_adapters(self, settings: InferenceSettings) -> None:
        """Puts the adapters of a request into the loaded diffusion model. Raises WeightsError and ConfigError."""
        base = self.summaries["model"].sha256 if settings.lora else ""
        if self.adapters.use(self.model, settings, base, self.dtype):
            self.same_bits.clear()
            self._offloader.offload("model", self.model)
            if isinstance(self.denoiser, CapturedModel):
                self.denoiser.forget()

    def _needs_loading(self, size: Size) -> bool:
        if self.model is None:
            return True
        return self._needs_rebuild(tuple(self.vae.get_latent_size(size)), self._loaded_for)

    def _load_weights(self, part: str, built: nn.Module, linear: str = "exact") -> Any:
        section = getattr(self.settings, part)
        self._record_summary(
            part, builder.load_model_weights(built, section, self.path(part), self.device, self.dtype, linear)
        )
        return built

    def _record_summary(self, part: str, summary: Summary) -> None:
        self.summaries[part] = summary
        logger.info("%-13s %s", part.replace("_", " "), summary)

    # 4. compile, split over ranks, capture

    def _accelerated(self, model: Any) -> Any:
        settings, plan = self.settings, self.plan
        if settings.compile and plan.chunked:
            logger.warning("nothing is compiled: --memory %s runs blocks in chunks", plan.name)
        elif settings.compile:
            compile_blocks(model)
        model = guidance_parallel(model, self.layout, settings.guidance_ranks)
        if settings.graphs and plan.offload:
            logger.warning("no graphs are captured: --memory %s offloads the weights", plan.name)
        elif settings.graphs:
            return CapturedModel(model)
        return model

    # in use

    @property
    def sequential_cfg(self) -> bool:
        """Whether the guidance branches are evaluated one after the other."""
        return self.plan.sequential_cfg and self.settings.guidance_ranks != "apart"

    def on_device(self, part: str) -> AbstractContextManager[Any]:
        """A context in which the weights of an offloaded part ("model" or "vae") are on the device."""
        return self._offloader.onloaded(part)

    def hashes(self) -> dict[str, str]:
        """Part -> SHA-256 of its weights, those of the adapters in place ("lora 1", ...) and of the tokenizer."""
        return {part: one.sha256 for part, one in self.summaries.items()} | self.adapters.hashes | self.tokenizer


def check_fit(model: Any, vae: Any, text_encoder: Any) -> None:
    """Raises ConfigError when the models do not fit together."""
    channels, condition = model.config["caption_channels"], model.config.get("condition", "text")
    if model.in_channels != vae.out_channels:
        made = vae.out_channels
        raise ConfigError(f"the model takes {model.in_channels} latent channels, but the autoencoder makes {made}")
    if isinstance(text_encoder, ClassIds):
        if condition != f"label_{text_encoder.num_classes}":
            problem = f"the model's condition is '{condition}', but prompts are {text_encoder.num_classes} classes"
            raise ConfigError(problem)
    elif condition != "text":
        raise ConfigError(f"the model's condition is '{condition}'; it needs text_encoder = dict(type='classes', ...)")
    elif channels != (made := text_encoder.output_dim):
        raise ConfigError(f"the model takes {channels} text channels, but the text encoder makes {made}")
