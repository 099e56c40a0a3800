"""What a run is asked to do: frozen, checked dataclasses built from a configuration.

Sizes and durations stay as written ("480p", "4s"); the pipeline resolves them with `datasets.aspect`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

from opensora.errors import ConfigError, did_you_mean

Settings = TypeVar("Settings", bound="_Settings")

SECTIONS = ("model", "vae", "text_encoder", "scheduler", "dataset", "discriminator")
CHOICES = {
    "dtype": ("bf16", "bfloat16", "fp16", "float16", "half", "fp32", "float32", "float64"),
    "plugin": ("zero2", "zero2-seq"),
    "lr_schedule": ("constant", "cosine"),
    "method": ("model", "bisect", "grid"),
    "on_bad_step": ("skip", "rollback", "stop"),
    "cache": ("none", "auto", "table", "tea", "mag"),
    "memory": ("auto", "fast", "balanced", "low"),
    "cpu_dtype": ("fp32", "bf16"),
    "linear": ("exact", "int8", "fp8"),
    "mixed_strategy": ("mixed_video_image", "mixed_video_random"),
    "guidance_ranks": ("auto", "together", "apart"),
}
SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32"}
KINDS = {"int": {int}, "float": {int, float}, "bool": {bool}, "str": {str}, "dict": {dict}, "None": {type(None)}}
# Settings of the documents that training, or that of autoencoders, cannot follow; their defaults ask for nothing.
NOT_YET_IN_TRAINING = ("discriminator", "use_image_identity_loss")
NOT_YET_IN_VAE_TRAINING = (
    *NOT_YET_IN_TRAINING, "sp_size", "grad_checkpoint", "bucket_config", "mask_ratios", "accumulation_steps",
    "load_video_features", "load_text_features",
)  # fmt: skip
# Settings of the documents' other programs, and such as only matter beside one of the above: accepted and left out.
OF_NO_EFFECT = {
    "base", "base_step_time", "bin_size", "cal_stats", "discriminator_factor", "discriminator_loss_type",
    "discriminator_start", "end_index", "generator_factor", "generator_loss_type", "gradient_penalty_loss_weight",
    "lecam_loss_weight", "log_stats_every", "log_time", "logvar_init", "model_max_length", "num_bucket_build_workers",
    "num_eval_timesteps", "num_samples", "save_compressed_text_features", "save_dir", "save_text_features",
    "start_index", "text_encoder_model_max_length", "text_encoder_output_dim", "vae_out_channels",
}  # fmt: skip
# Spellings of older documents and versions: `section.key` or `key` -> key, `section.key=value` -> value.
LEGACY = {
    "model.enable_flashattn": "enable_flash_attn",
    "scheduler.type=dmp-solver": "dpm-solver",
    "multi_resolution=True": "PixArtMS", "multi_resolution=False": None,
    **{f"mask_ratios.mask_{part}{place}": f"{part or 'quarter_'}{place}"
       for part in ("", "quarter_", "image_") for place in ("random", "head", "tail", "head_tail")},
    "mask_ratios.mask_no": "identity", "mask_ratios.mask_random": "random",
}  # fmt: skip


def check_trainable(settings: TrainSettings, unable: Sequence[str] = NOT_YET_IN_TRAINING) -> None:
    """Raises ConfigError when the settings ask for something that training would not do."""
    for name in unable:
        if getattr(settings, name) != getattr(TrainSettings, name):
            raise ConfigError(f"{name} is not supported by training yet; leave it out")
    if settings.plugin == "zero2-seq" and settings.sp_size == 1:
        remedy = "set sp_size to 2 or more, or plugin='zero2'"
        raise ConfigError(f"plugin 'zero2-seq' divides each clip among sp_size ranks, but sp_size is 1; {remedy}")


def setting(default: Any = MISSING, help: str = "", *, least: float | None = None, nargs: Any = None) -> Any:
    """A dataclass field, required without a default; its number must be at least `least`.

    `help` gives it a command line flag, whose values are of the first kind annotated; `nargs` 0 makes that a switch.
    """
    return dataclasses.field(default=default, metadata={"help": help, "least": least, "nargs": nargs})


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Fields and checks that inference and training share; a wrong value raises ConfigError on construction."""

    model: dict
    vae: dict | None = None
    text_encoder: dict | None = None
    scheduler: dict | None = None
    dataset: dict | None = None
    dtype: str = setting("bf16", "bf16, fp16 or fp32")
    seed: int = setting(1024, "random seed")
    device: str | None = setting(None, "device to run on, such as cpu, cuda or mps")
    offline: bool = setting(False, "never ask the network for anything", nargs=0)
    num_workers: int = setting(4, least=0)
    resolution: str | None = setting(None, "name of a size, such as 240p or 720p")
    image_size: tuple[int, int] | None = None
    perceptual_loss_weight: float = setting(0.1, least=0)
    kl_loss_weight: float = setting(1e-6, least=0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        if self.image_size is not None and not (_is_pair(self.image_size, int) and min(self.image_size) > 0):
            raise ConfigError(f"image_size must be (height, width) in pixels; it is {self.image_size!r}")
        object.__setattr__(self, "dtype", SHORT_DTYPES.get(self.dtype, self.dtype))

    @classmethod
    def from_config(cls: type[Settings], config: dict[str, Any], source: str) -> Settings:
        """The settings of a configuration dict; `source` (its file) opens every ConfigError."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        config = {n: value for n, value in _modernised(config).items() if n in fields or n not in OF_NO_EFFECT}
        try:
            for name in config:
                if name not in fields:
                    raise ConfigError(f"unknown setting '{name}'{did_you_mean(name, fields)}")
            for name, field in fields.items():
                if field.default is MISSING and config.get(name) is None:
                    raise ConfigError(f"setting '{name}' is missing")
            return cls(**{name: _shaped(value, fields[name].type) for name, value in config.items()})
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class InferenceSettings(_Settings):
    """One generation request. `image_size` (height, width) decides over `resolution` and `aspect_ratio`."""

    num_frames: str | int = setting(help="number of frames, or 4s; 1 makes an image", least=1)
    image_size: tuple[int, int] | None = setting(None, "height and width; wins over --resolution")
    save_dir: str = setting("./samples", "folder for the results")
    output: str | None = setting(None, "file for the result, such as circle.mp4; wins over --save-dir")
    overwrite: bool = setting(False, "replace results of the same name instead of taking the next number", nargs=0)
    fps: int | float = setting(24, "frame rate that the model is told", least=1)
    frame_interval: int = setting(1, "step between source frames; divides the saved rate without save-fps", least=1)
    save_fps: int | float | None = setting(None, "frame rate of the saved video", least=1)
    aspect_ratio: str | None = setting(None, "height:width, such as 9:16 for landscape")
    prompt: Sequence[str] | None = setting(None, "prompts")
    prompt_path: str | None = setting(None, "text file with one prompt a line")
    prompt_as_path: bool = setting(False, "name the results after their prompts", nargs=0)
    allow_downloads: bool = setting(False, "fetch what a prompt file, recipe or draft names", nargs=0)
    prompt_generator: str = setting("", "program that makes prompts")
    llm_refine: bool = setting(False, "let a language model refine the prompts")
    llm_base_url: str | None = setting(None, "its server, such as http://localhost:8000/v1; else OPENAI_BASE_URL")
    llm_model: str | None = setting(None, "its name; else OPENAI_MODEL")
    refined: dict | None = None  # what it answered: text of a prompt -> the text in its place
    start_index: int = setting(0, "first prompt to use", least=0)
    end_index: int | None = setting(None, "the prompt to stop before")
    num_sample: int = setting(1, "results for each prompt", least=1)
    sample_name: str | None = setting(None, "results are named {sample-name}_0000 instead of sample_0000")
    batch_size: int = setting(1, "samples computed together", least=1)
    multi_resolution: str | None = None
    aes: float | None = setting(None, "aesthetic score added to the prompt")
    flow: float | None = setting(None, "motion score added to the prompt")
    camera_motion: str | None = setting(None, "camera motion added to the prompt")
    loop: int = setting(1, "clips to chain into one long video", least=1)
    condition_frame_length: int = setting(5, "latent frames that each clip takes over from the one before", least=0)
    condition_frame_edit: float = setting(0.0, least=0)
    align: int | None = setting(None, least=1)
    reference_path: Sequence[str] | None = setting(None, "reference images or videos, one entry for each prompt")
    mask_strategy: Sequence[str] | None = setting(None, "where the references go, one entry for each prompt")
    image: str | None = setting(None, "image that the video begins with")
    first_frame: str | None = setting(None, "image that the video begins with")
    last_frame: str | None = setting(None, "image that the video ends with")
    extend: str | None = setting(None, "video to go on from")
    keep: str | None = setting(None, "how much of its end to keep, in frames or as 1s")
    edit: str | None = setting(None, "video to repaint")
    strength: float | None = setting(None, "how much of it changes, 0 to 1", least=0)
    watermark: bool | str = setting(False, "write 'AI generated' on the frames; other texts as watermark='...'")
    preview: bool = setting(False, "also save a contact sheet of each video", nargs=0)
    verbose: int = setting(1, "0 hides the progress of sampling", least=0)
    steps_until: int | None = setting(None, "stop after so many steps; opensora continue does the rest", least=1)
    draft: bool = setting(False, "the same, after about a third of the steps", nargs=0)
    cache: str = setting("none", "foretell some of the model's evaluations: none, auto, table, tea or mag")
    max_error: float = setting(0.02, "most that --cache auto may change the latents, relative to their size", least=0)
    cache_threshold: float | None = setting(None, "of tea and mag: how much change to let pass", least=0)
    cache_prompts: Sequence[str] | None = setting(None, "prompts that --cache auto tries itself on")
    cache_table: dict | None = None  # what is computed in each evaluation; recipes hold it
    cache_psnr: bool = setting(False, "also make each result without cache and guidance interval, and compare", nargs=0)
    guidance_interval: tuple[float, float] | None = setting(None, "part of the run with guidance, such as 0.1 0.8")
    guidance_ranks: str = setting("auto", "on several ranks, its halves on half of them each: auto, together or apart")
    attention: str | None = setting(None, "attention of an installed package that PyTorch knows, such as FA3")
    cpu_dtype: str = setting("fp32", "what a CPU computes in, whatever --dtype: fp32, or bf16, fast on some")
    linear: str = setting("exact", "linear layers of the model's blocks: exact, or in 8 bits, int8 or fp8")
    memory: str = setting("auto", "memory to take: fast (most), balanced, low, or auto: what fits")
    compile: bool = setting(False, "compile the model's blocks: the first step takes a minute", nargs=0)
    graphs: bool = setting(False, "record a step on the accelerator once and replay it: for small sizes", nargs=0)
    outputs: str | None = setting(None, "folder of training runs")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("num_sampling_steps", 1), ("cfg_scale", 0)):
            if self.scheduler and self.scheduler.get(name) is not None:
                _check_at_least(f"scheduler.{name}", self.scheduler[name], least)
        if isinstance(self.watermark, str) and self.watermark.lower() in ("true", "false"):
            raise ConfigError(f"watermark must be bool, or the text to write; it is {self.watermark!r}")
        part = self.guidance_interval
        if part is not None and not (_is_pair(part, int | float) and 0 <= part[0] < part[1] <= 1):
            raise ConfigError(f"guidance_interval must be two rising numbers from 0 to 1; it is {part!r}")
        if (self.draft or self.steps_until) and (self.cache != "none" or part is not None):
            raise ConfigError("a draft cannot go on with a cache or a guidance_interval; leave them out")
        if self.cache_prompts is not None and len(self.cache_prompts) < 2:
            raise ConfigError("cache_prompts needs at least two prompts: one to learn from and one to try")

    @property
    def output_fps(self) -> float:
        """Frames per second of the saved video: `save_fps`, else `fps // frame_interval`."""
        return self.save_fps or max(self.fps // self.frame_interval, 1)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(_Settings):
    """One training run of a diffusion model or an autoencoder."""

    discriminator: dict | None = None
    bucket_config: dict | None = None
    mask_ratios: dict | None = None
    num_frames: int | None = setting(None, least=1)
    batch_size: int | None = setting(None, "samples computed together", least=1)

    outputs: str = setting("outputs", "folder of training runs")
    wandb: bool = setting(False, "log to Weights & Biases", nargs="?")
    tensorboard: bool = setting(True, "write event files for tensorboard, if it is installed", nargs="?")
    load: str | None = setting(None, "checkpoint folder to resume from")
    start_from_scratch: bool = setting(False, "take all of --load but its position in the data", nargs=0)
    accept_changes: bool = setting(False, "go on from --load with other data or settings, and say which", nargs=0)
    epochs: int = setting(1000, least=1)
    max_steps: int | None = setting(None, least=1)
    max_minutes: float | None = setting(None, least=0)
    log_every: int = setting(1, least=1)
    ckpt_every: int = setting(0, least=0)
    keep_checkpoints: int = setting(2, least=1)
    validate_every: int = setting(0, "steps between validations on clips that are held out; 0: none", least=0)
    validation_samples: int = setting(16, "clips of each bucket that are held out for it", least=1)
    sample_every: int = setting(0, "steps between videos of --sample-prompts; 0: none", least=0)
    sample_prompts: Sequence[str] | None = setting(None, "prompts of these videos")
    on_bad_step: str = setting("skip", "skip, rollback or stop when a step is not finite or its gradients jump")
    max_bad_steps: int = setting(10, "stop after so many bad steps in a row", least=1)
    spike_factor: float = setting(20.0, "gradients jump above so many times their median; 0: they may", least=0)

    lr: float = setting(1e-4, "learning rate", least=0)
    lr_schedule: str = "constant"
    warmup_steps: int | None = setting(None, "steps of linear warm-up", least=0)
    weight_decay: float = setting(0.0, least=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = setting(1e-8, least=0)
    grad_clip: float = setting(0.0, least=0)
    accumulation_steps: int = setting(1, "batches whose gradients are added up for one step", least=1)
    ema_decay: float = setting(0.9999, least=0)
    grad_checkpoint: bool = False
    compile: bool = False
    plugin: str = "zero2"
    sp_size: int = setting(1, least=1)

    load_video_features: bool = False
    load_text_features: bool = False
    mixed_strategy: str | None = None
    mixed_image_ratio: float = setting(0.0, least=0)
    use_real_rec_loss: bool = False
    use_z_rec_loss: bool = False
    use_image_identity_loss: bool = False
    freeze_encoders: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_pair(self.adam_betas, int | float) or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ConfigError(f"adam_betas must be two numbers from 0 to below 1; it is {self.adam_betas!r}")
        if self.ema_decay > 1 or self.mixed_image_ratio > 1:
            raise ConfigError("ema_decay and mixed_image_ratio must lie between 0 and 1")

    @classmethod
    def from_config(cls: type[Settings], config: dict[str, Any], source: str) -> Settings:
        """Also gathers the data settings that 1.0 kept at the top level into `dataset`."""
        config = dict(config)
        if "data_path" in config and "dataset" not in config:
            if config.pop("root", None) is not None:
                problem = "setting 'root' is no longer supported; write whole paths into the table of data_path"
                raise ConfigError(f"{source}: {problem}")
            config.pop("use_image_transform", None)
            names = ("data_path", "num_frames", "frame_interval", "image_size")
            config["dataset"] = {"type": "VideoTextDataset", **{n: config.pop(n) for n in names if n in config}}
        return super().from_config(config, source)


@dataclass(frozen=True, kw_only=True)
class SearchSettings(TrainSettings):
    """One search for batch sizes: a training whose `bucket_config` has (guess, range), and what to aim at."""

    base: tuple[str, str | int] | None = None
    base_step_time: float | None = setting(None, "seconds that a step of each bucket should take")
    method: str = setting("model", "model (few trials), bisect (as in 1.2) or grid (as in 1.1)")
    untimed_steps: int = setting(5, "steps of a trial before the clock starts", least=0)
    active_steps: int = setting(5, "steps of a trial that are timed", least=1)
    output: str | None = setting(None, "configuration to write; default: search_bs.py in the folder of outputs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_step_time is not None and not 0 < self.base_step_time < float("inf"):
            raise ConfigError(f"base_step_time must be a number of seconds above 0; it is {self.base_step_time!r}")


def _check(field: dataclasses.Field, value: Any) -> None:
    """Raises ConfigError unless `value` has a kind of the field's annotation and lies in its range."""
    name, kinds = field.name, field.type.split(" | ")
    if set(kinds) <= set(KINDS) and not any(type(value) in KINDS[kind] for kind in kinds):
        raise ConfigError(f"{name} must be {' or '.join(kinds)}; it is {value!r}")
    if value is None:
        return
    if "Sequence[str]" in kinds and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        raise ConfigError(f"{name} must be a list of texts; it is {value!r}")
    if name in CHOICES and value not in CHOICES[name]:
        raise ConfigError(f"{name} {value!r} is not known; choose one of {', '.join(CHOICES[name])}")
    if name in SECTIONS and not isinstance(value.get("type"), str):
        raise ConfigError(f"{name} needs a type, like {name} = dict(type='...')")
    if field.metadata.get("least") is not None and not isinstance(value, str):
        _check_at_least(name, value, field.metadata["least"])


def _check_at_least(name: str, value: Any, least: float) -> None:
    if not isinstance(value, int | float) or not least <= value < float("inf"):
        raise ConfigError(f"{name} must be at least {least}; it is {value!r}")


def _is_pair(value: Any, kind: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(item, kind) for item in value)


def _modernised(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`config` with the spellings of `LEGACY` replaced and whole numbers of frames as numbers, in its sections too."""
    modern: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            value = _modernised(value, f"{path}.")
        elif isinstance(value, str | bool):
            value = LEGACY.get(f"{path}={value}", value)
        if key == "num_frames" and isinstance(value, str) and value.removeprefix("-").isdecimal():
            value = int(value)
        modern[LEGACY.get(path, key)] = value
    return modern


def _shaped(value: Any, annotation: str) -> Any:
    """A tuple of a list where one is annotated; a list of texts of one text, or of one with None for empty texts."""
    if annotation.startswith("tuple") and isinstance(value, list):
        return tuple(value)
    if annotation.startswith("Sequence") and isinstance(value, str | list | tuple):
        return ["" if text is None else text for text in ([value] if isinstance(value, str) else value)]
    return value
