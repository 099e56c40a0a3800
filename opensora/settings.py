"""What a run is asked to do: frozen, checked dataclasses built from a configuration.

Sizes and durations stay as written ("480p", "4s"); the pipeline resolves them with `datasets.aspect`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from opensora.errors import ConfigError, did_you_mean

Settings = TypeVar("Settings", bound="_Settings")

SECTIONS = ("model", "vae", "text_encoder", "scheduler", "dataset", "discriminator")
CHOICES = {
    "dtype": ("bf16", "bfloat16", "fp16", "float16", "half", "fp32", "float32", "float64"),
    "plugin": ("zero2", "zero2-seq"),
    "lr_schedule": ("constant", "cosine"),
    "mixed_strategy": ("mixed_video_image", "mixed_video_random"),
}
SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32"}
KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str, "dict": dict, "None": type(None)}

# Spellings of older documents and versions: `section.key` or `key` -> key, `section.key=value` -> value.
LEGACY = {
    "model.enable_flashattn": "enable_flash_attn",
    "scheduler.type=dmp-solver": "dpm-solver",
    "model_max_length": "text_encoder_model_max_length",
    "mask_ratios.mask_no": "identity",
    **{f"mask_ratios.mask_{part}_{place}": f"{part}_{place}"
       for part in ("quarter", "image") for place in ("random", "head", "tail", "head_tail")},
}  # fmt: skip


def bounded(default: Any = dataclasses.MISSING, *, least: float) -> Any:
    """A dataclass field whose number must be at least `least`; without a default it is required."""
    return dataclasses.field(default=default, metadata={"least": least})


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Fields and checks that inference and training share."""

    model: dict
    vae: dict | None = None
    text_encoder: dict | None = None
    scheduler: dict | None = None
    dataset: dict | None = None
    dtype: str = "bf16"
    seed: int = 1024
    device: str | None = None
    offline: bool = False
    num_workers: int = bounded(4, least=0)
    resolution: str | None = None
    image_size: tuple[int, int] | None = None
    perceptual_loss_weight: float = bounded(0.1, least=0)
    kl_loss_weight: float = bounded(1e-6, least=0)
    logvar_init: float = 0.0

    def __post_init__(self) -> None:
        self._set(image_size=_size(self.image_size))
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        self._set(dtype=SHORT_DTYPES.get(self.dtype, self.dtype))

    @classmethod
    def from_config(cls: type[Settings], config: dict[str, Any], source: str) -> Settings:
        """The settings of a configuration dict; `source` (its file) opens every ConfigError."""
        try:
            config = cls._modernised(config)
            fields = {field.name: field for field in dataclasses.fields(cls)}
            for name in config:
                if name not in fields:
                    raise ConfigError(f"unknown setting '{name}'{did_you_mean(name, fields)}")
            for name, field in fields.items():
                if field.default is dataclasses.MISSING and config.get(name) is None:
                    raise ConfigError(f"setting '{name}' is missing")
            return cls(**config)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error

    @classmethod
    def _modernised(cls, config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """`config` with the spellings of `LEGACY` replaced, in its sections too."""
        modern: dict[str, Any] = {}
        for key, value in config.items():
            path = f"{prefix}{key}"
            if isinstance(value, dict):
                value = cls._modernised(value, f"{path}.")
            elif isinstance(value, str):
                value = LEGACY.get(f"{path}={value}", value)
            modern[LEGACY.get(path, key)] = value
        return modern

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class InferenceSettings(_Settings):
    """One generation request. `image_size` (height, width) decides over `resolution` and `aspect_ratio`.

    Raises ConfigError on construction when a value is out of range.
    """

    num_frames: int | str = bounded(least=1)
    save_dir: str = "./samples"
    fps: float = bounded(24, least=1)
    frame_interval: int = bounded(1, least=1)
    save_fps: float | None = bounded(None, least=1)
    aspect_ratio: str | None = None
    prompt: list[str] | None = None
    prompt_path: str | None = None
    prompt_as_path: bool = False
    prompt_generator: str = ""
    llm_refine: bool = False
    start_index: int = bounded(0, least=0)
    end_index: int | None = None
    num_sample: int = bounded(1, least=1)
    sample_name: str | None = None
    batch_size: int = bounded(1, least=1)
    multi_resolution: str | bool | None = None
    aes: float | None = None
    flow: float | None = None
    camera_motion: str | None = None
    loop: int = bounded(1, least=1)
    condition_frame_length: int = bounded(5, least=0)
    condition_frame_edit: float = bounded(0.0, least=0)
    align: int | None = bounded(None, least=1)
    reference_path: list[str] | None = None
    mask_strategy: list[str] | None = None
    watermark: bool = False
    preview: bool = False
    verbose: int = bounded(1, least=0)
    outputs: str | None = None
    cal_stats: bool = False
    log_stats_every: int = bounded(100, least=1)
    num_samples: int | None = bounded(None, least=1)

    def __post_init__(self) -> None:
        self._set(num_frames=_frames(self.num_frames))
        self._set(**{name: _texts(name, getattr(self, name)) for name in ("prompt", "reference_path", "mask_strategy")})
        super().__post_init__()
        if self.dataset and self.dataset.get("num_frames") is not None:
            self._set(dataset={**self.dataset, "num_frames": _frames(self.dataset["num_frames"])})
        for name, bound in (("num_sampling_steps", 1), ("cfg_scale", 0)):
            if self.scheduler and self.scheduler.get(name) is not None:
                _check_at_least(f"scheduler.{name}", self.scheduler[name], bound)

    @property
    def output_fps(self) -> float:
        """Frames per second of the saved video: `save_fps`, else `fps // frame_interval`."""
        return self.save_fps or max(self.fps // self.frame_interval, 1)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(_Settings):
    """One training run of a diffusion model or an autoencoder, a batch-size search, or a feature extraction.

    Raises ConfigError on construction when a value is out of range.
    """

    discriminator: dict | None = None
    bucket_config: dict | None = None
    mask_ratios: dict | None = None
    num_frames: int | None = bounded(None, least=1)
    num_bucket_build_workers: int = bounded(1, least=1)
    batch_size: int | None = bounded(None, least=1)

    outputs: str = "outputs"
    wandb: bool = False
    load: str | None = None
    start_from_scratch: bool = False
    freeze: tuple[str, ...] = ()
    epochs: int = bounded(1000, least=1)
    max_steps: int | None = bounded(None, least=1)
    max_minutes: float | None = bounded(None, least=0)
    log_every: int = bounded(1, least=1)
    ckpt_every: int = bounded(0, least=0)
    keep_checkpoints: int = bounded(2, least=1)

    lr: float = bounded(1e-4, least=0)
    lr_schedule: str = "constant"
    warmup_steps: int | None = bounded(None, least=0)
    weight_decay: float = bounded(0.0, least=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = bounded(1e-8, least=0)
    grad_clip: float = bounded(0.0, least=0)
    ema_decay: float = bounded(0.9999, least=0)
    grad_checkpoint: bool = False
    compile: bool = False
    plugin: str = "zero2"
    sp_size: int = bounded(1, least=1)

    load_video_features: bool = False
    load_text_features: bool = False
    vae_out_channels: int = 4
    text_encoder_model_max_length: int = 300
    text_encoder_output_dim: int = 4096

    mixed_strategy: str | None = None
    mixed_image_ratio: float = bounded(0.0, least=0)
    use_real_rec_loss: bool = False
    use_z_rec_loss: bool = False
    use_image_identity_loss: bool = False
    discriminator_factor: float = 1.0
    discriminator_start: int = -1
    discriminator_loss_type: str = "hinge"
    generator_factor: float = 0.5
    generator_loss_type: str = "hinge"
    lecam_loss_weight: float | None = None
    gradient_penalty_loss_weight: float | None = None

    base: tuple[Any, Any] | None = None
    base_step_time: float | None = bounded(None, least=0)

    bin_size: int | None = bounded(None, least=1)
    save_dir: str | None = None
    save_text_features: bool = False
    save_compressed_text_features: bool = False
    log_time: bool = False
    start_index: int = bounded(0, least=0)
    end_index: int | None = None
    num_eval_timesteps: int | None = bounded(None, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_pair(self.adam_betas, int | float) or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ConfigError(f"adam_betas must be two numbers from 0 to below 1; it is {self.adam_betas!r}")
        if self.ema_decay > 1 or self.mixed_image_ratio > 1:
            raise ConfigError("ema_decay and mixed_image_ratio must lie between 0 and 1")
        if self.base is not None and not _is_pair(self.base, int | float | str):
            raise ConfigError(f"base must be (resolution, num_frames) or (batch_size, step_time); it is {self.base!r}")

    @classmethod
    def _modernised(cls, config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """Also gathers the data settings that 1.0 kept at the top level into `dataset`."""
        config = super()._modernised(config, prefix)
        if prefix or "dataset" in config or "data_path" not in config:
            return config
        if config.pop("root", None) is not None:
            raise ConfigError("setting 'root' is no longer supported; write whole paths into the table of data_path")
        config.pop("use_image_transform", None)
        names = ("data_path", "num_frames", "frame_interval", "image_size")
        return config | {"dataset": {"type": "VideoTextDataset", **{n: config.pop(n) for n in names if n in config}}}


def _check(field: dataclasses.Field, value: Any) -> None:
    """Raises ConfigError unless `value` has a kind of the field's annotation and lies in its range."""
    name, kinds = field.name, field.type.split(" | ")
    if set(kinds) <= set(KINDS):
        fits = any(isinstance(value, KINDS[kind]) for kind in kinds)
        if not fits or (isinstance(value, bool) and "bool" not in kinds):
            raise ConfigError(f"{name} must be {' or '.join(kinds)}; it is {value!r}")
    if value is None:
        return
    if name in CHOICES and value not in CHOICES[name]:
        raise ConfigError(f"{name} {value!r} is not known; choose one of {', '.join(CHOICES[name])}")
    if name in SECTIONS and not isinstance(value.get("type"), str):
        raise ConfigError(f"{name} needs a type, like {name} = dict(type='...')")
    if "least" in field.metadata and not isinstance(value, str):
        _check_at_least(name, value, field.metadata["least"])


def _check_at_least(name: str, value: Any, least: float) -> None:
    if not isinstance(value, int | float) or not least <= value < float("inf"):
        raise ConfigError(f"{name} must be at least {least}; it is {value!r}")


def _is_pair(value: Any, kind: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(item, kind) for item in value)


def _size(value: Any) -> tuple[int, int] | None:
    if value is not None and not (_is_pair(value, int) and min(value) > 0):
        raise ConfigError(f"image_size must be (height, width) in pixels; it is {value!r}")
    return value and tuple(value)


def _frames(value: Any) -> Any:
    """A count of frames written as text becomes a number; a duration such as '4s' stays."""
    return int(value) if isinstance(value, str) and value.removeprefix("-").isdecimal() else value


def _texts(name: str, value: Any) -> list[str] | None:
    """A list of texts; one text stands for a list of one, and None inside a list for an empty text."""
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str | None) for text in texts):
        raise ConfigError(f"{name} must be a list of texts; it is {value!r}")
    return [text or "" for text in texts]
