"""Settings of training runs, of the batch-size search and of feature extraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from opensora.config.fields import Settings, one_of, setting
from opensora.config.legacy import move_data_settings
from opensora.config.schema import FilePath, Int, Name, Number, Pair, described_as
from opensora.config.sections.common import MAX_FRAMES
from opensora.config.sections.data import BucketConfig, MaskRatios
from opensora.config.sections.lora import LoRA
from opensora.config.settings.common import CommonSettings
from opensora.errors import ConfigError

BAD_STEPS = one_of("skip", "rollback", "stop")
METHODS = one_of("model", "bisect", "grid")
Betas = Annotated[Pair[Annotated[Number, Field(ge=0, lt=1)]], described_as("two numbers from 0 to below 1")]
Bucket = Annotated[Pair[Name | Int], described_as("(resolution, number of frames)")]
Seconds = Annotated[Number, Field(gt=0, le=1e9)]
# Published settings that training does not support; their defaults have no effect.
NOT_YET_IN_TRAINING = ("discriminator", "use_image_identity_loss")
NOT_YET_IN_VAE_TRAINING = (
    *NOT_YET_IN_TRAINING, "sp_size", "grad_checkpoint", "bucket_config", "mask_ratios", "accumulation_steps",
    "load_video_features", "load_text_features", "lora", "linear",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainSettings(CommonSettings):
    """One training run of a diffusion model or an autoencoder."""

    discriminator: dict | None = setting(
        None, doc="autoencoders; not supported by training yet", example={"type": "N_Layer_discriminator_3D"}
    )
    bucket_config: dict | None = setting(
        None, schema=BucketConfig, example={"480p": {1: (1.0, 4), 51: ((0.5, 0.3), 1)}},
        doc="resolution -> frames -> (keep probability, batch size); two probabilities: (keep at this resolution, keep "
        "at this number of frames)",
    )  # fmt: skip
    mask_ratios: dict | None = setting(
        None, schema=MaskRatios, example={"identity": 0.9, "image_head": 0.1},
        doc="frame masking: kind of mask -> share of the clips",
    )  # fmt: skip
    input_perturbation: float = setting(
        0.0, minimum=0, maximum=1,
        doc="share of the rendered clips whose noised latents lean to another color or shape, for the model to correct",
    )  # fmt: skip
    num_frames: int | None = setting(None, minimum=1, maximum=MAX_FRAMES, doc="frames of a clip (1.0)", example=16)
    batch_size: int | None = setting(None, "samples per batch", minimum=1, maximum=100_000, example=8)

    outputs: str = setting("outputs", "folder of training runs", schema=FilePath)
    wandb: bool = setting(False, "log to Weights & Biases", nargs="?")
    tensorboard: bool = setting(True, "write TensorBoard event files, if tensorboard is installed", nargs="?")
    load: str | None = setting(
        None, "run folder or checkpoint to resume from, or auto: the newest that matches", schema=FilePath,
        example="outputs/000-STDiT3-XL-2/epoch0-global_step500",
    )  # fmt: skip
    start_from_scratch: bool = setting(False, "with --load: restart at step 0, at the beginning of the data", nargs=0)
    accept_changes: bool = setting(False, "with --load: resume although data or settings have changed", nargs=0)
    epochs: int = setting(1000, minimum=1, doc="passes over the data")
    max_steps: int | None = setting(None, minimum=1, doc="number of steps after which the run ends", example=20_000)
    max_minutes: float | None = setting(None, minimum=0, doc="minutes after which the run ends", example=60)
    log_every: int = setting(1, minimum=1, doc="steps between log lines")
    ckpt_every: int = setting(0, minimum=0, doc="steps between checkpoints; 0: only at the end")
    keep_checkpoints: int | None = setting(
        None, minimum=1, example=3, doc="number of newest checkpoints to keep; None: as before in this run, or 2"
    )
    validate_every: int = setting(0, "steps between validations on held-out clips; 0: none", minimum=0)
    validation_samples: int = setting(16, "held-out clips per bucket", minimum=1, maximum=1_000_000)
    sample_every: int = setting(0, "steps between videos of --sample-prompts; 0: none", minimum=0)
    sample_prompts: Sequence[str] | None = setting(None, "prompts of the videos during training", example=["a cat"])
    on_bad_step: str = setting(
        "skip", "when a step is not finite or its gradient norm spikes: skip, rollback or stop", schema=BAD_STEPS
    )
    max_bad_steps: int = setting(10, "stop after this many bad steps in a row", minimum=1)
    spike_factor: float = setting(
        20.0, "a gradient norm above this many times the median is a spike; 0: never", minimum=0
    )

    lr: float = setting(1e-4, "learning rate", minimum=0)
    lr_schedule: str = setting("constant", schema=one_of("constant", "cosine"), doc="learning-rate schedule")
    warmup_steps: int | None = setting(None, "steps of linear warmup", minimum=0, example=1000)
    weight_decay: float = setting(0.0, minimum=0, doc="weight decay of AdamW")
    adam_betas: tuple[float, float] = setting((0.9, 0.999), schema=Betas, doc="betas of AdamW")
    adam_eps: float = setting(1e-8, minimum=0, doc="epsilon of AdamW")
    grad_clip: float = setting(0.0, minimum=0, doc="maximum gradient norm; 0: no clipping")
    accumulation_steps: int = setting(1, "gradient accumulation: batches per step", minimum=1, maximum=1_000_000)
    ema_decay: float = setting(
        0.9999, minimum=0, maximum=1, doc="decay of the exponential moving average of the weights"
    )
    lora: dict | None = setting(
        None, schema=LoRA, example={"rank": 16, "alpha": 16, "targets": ["attn.qkv", "mlp.*"]},
        doc="train an adapter of the frozen model: rank, alpha (default: rank), targets (default: the attentions and "
        "MLPs of all blocks), rank_pattern, alpha_pattern; see [lora.md](lora.md)",
    )  # fmt: skip
    linear: str = setting(
        "exact", schema=one_of("exact", "int8", "fp8"),
        doc="with lora: the frozen linear layers as in the file (exact), or in 8 bits",
    )  # fmt: skip
    grad_checkpoint: bool = setting(False, doc="activation checkpointing: less memory, a third more time")
    compile: bool = setting(False, doc="compile the model's blocks")
    plugin: str = setting(
        "zero2",
        schema=one_of("zero2", "zero2-seq"),
        doc="name of 1.2; both shard with FSDP2, zero2-seq needs sp_size > 1",
    )
    sp_size: int = setting(1, minimum=1, maximum=10_000, doc="sequence parallelism: ranks that share a clip")

    load_video_features: bool = setting(
        False, doc="train on encoded clips; implied by a dataset of type EncodedDataset"
    )
    load_text_features: bool = setting(False, doc="train on encoded texts; implied by a dataset of type EncodedDataset")
    mixed_strategy: str | None = setting(
        None, schema=one_of("mixed_video_image", "mixed_video_random"), example="mixed_video_image",
        doc="autoencoders: cut clips to their first frame, or to a random length",
    )  # fmt: skip
    mixed_image_ratio: float = setting(0.0, minimum=0, maximum=1, doc="share of the steps that mixed_video_image cuts")
    use_real_rec_loss: bool = setting(False, doc="autoencoders: reconstruction loss against the video")
    use_z_rec_loss: bool = setting(
        False, doc="autoencoders: reconstruction loss against the image autoencoder's latents"
    )
    use_image_identity_loss: bool = setting(False, doc="autoencoders; not supported by training yet")
    freeze_encoders: bool = setting(False, doc="autoencoders: train only the decoders")
    latent_noise: float = setting(
        0.0, minimum=0, maximum=10,
        doc="autoencoders: largest deviation of noise on the latents that the temporal decoder gets",
    )  # fmt: skip
    restorer: dict | None = setting(
        None, example={"type": "STDiT3", "from_pretrained": "path/to/weights"},
        doc="decoders of autoencoders: diffusion model whose restored latents they get; captions need text_encoder",
    )  # fmt: skip
    restore_time: float = setting(
        0.45,
        minimum=0,
        maximum=1,
        doc="largest time, from 0 (data) to 1 (noise), from which the restorer restores latents",
    )
    contrast_weighting: float = setting(
        0.0, minimum=0, maximum=4, example=1.75,
        doc="autoencoders: power of 1/contrast by which frames count; above 0, the worst clips of a batch count more",
    )  # fmt: skip
    mean_color_loss_weight: float = setting(
        0.0, minimum=0, maximum=1000,
        doc="temporal autoencoders: weight of the loss that makes the first three latent channels mean colors",
    )  # fmt: skip
    latent_statistics_loss_weight: float = setting(
        0.0, minimum=0, maximum=1000,
        doc="temporal autoencoders: weight of the loss for latent channels of mean 0, variance 1, not correlated",
    )  # fmt: skip

    @classmethod
    def from_config(cls: type[Settings], config: dict[str, Any], source: str) -> Settings:
        """As `SettingsBase.from_config`; also moves the top-level data settings of 1.0 into `dataset`."""
        return super().from_config(move_data_settings(config, source), source)


@dataclass(frozen=True, kw_only=True)
class SearchSettings(TrainSettings):
    """One batch-size search: training settings whose `bucket_config` holds (guess, range), and the target step time."""

    base: tuple[str, str | int] | None = setting(
        None, schema=Bucket, doc="bucket whose step time becomes the target", example=("240p", 51)
    )
    base_step_time: float | None = setting(
        None, "target seconds per step in every bucket", schema=Seconds, example=12.0
    )
    method: str = setting("model", "model (few trials), bisect (as 1.2) or grid (as 1.1)", schema=METHODS)
    untimed_steps: int = setting(5, "warmup steps of a trial", minimum=0, maximum=10_000)
    active_steps: int = setting(5, "timed steps of a trial", minimum=1, maximum=10_000)
    output: str | None = setting(
        None, "configuration to write; default: search_bs.py in the folder of outputs", schema=FilePath,
        example="search_bs.py",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(TrainSettings):
    """One feature extraction. Of the training settings only those of the data have an effect."""

    model: dict | None = None  # type: ignore[assignment]  # features need no diffusion model
    save_dir: str = setting("features", "output folder of the features", schema=FilePath)
    start_index: int = setting(0, "first table row to encode", minimum=0)
    end_index: int | None = setting(None, "table row to stop before", example=1000)
    crops: int = setting(1, minimum=1, maximum=10_000, doc="temporal crops of each clip, drawn as in as many epochs")
    bin_size: int = setting(250, minimum=1, doc="most samples per shard")
    save_video_features: bool = setting(True, doc="encode the clips")
    save_text_features: bool = setting(True, doc="encode the texts")
    save_compressed_text_features: bool = setting(True, doc="accepted; padding is never stored")
    save_last_frames: bool = setting(True, doc="also store the last frame of each clip, for frame masking")
    save_dtype: str = setting("fp16", schema=one_of("fp16", "bf16", "fp32"), doc="number format of the features")
    replace_stale: bool = setting(False, doc="encode again what no longer matches the table")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.save_video_features or self.save_text_features):
            raise ConfigError("save_video_features and save_text_features are both off; there is nothing to encode")


def check_trainable(settings: TrainSettings, unsupported: Sequence[str] = NOT_YET_IN_TRAINING) -> None:
    """Raises ConfigError for settings that training does not support."""
    for name in unsupported:
        if getattr(settings, name) != getattr(TrainSettings, name):
            raise ConfigError(f"{name} is not supported by training yet; remove it")
    temporal = settings.use_z_rec_loss or settings.use_real_rec_loss
    if settings.latent_noise and not (temporal or settings.freeze_encoders):
        remedy = "set use_z_rec_loss, use_real_rec_loss or freeze_encoders=True, or remove it"
        raise ConfigError(f"latent_noise is for training temporal decoders; {remedy}")
    if settings.restorer and not settings.freeze_encoders:
        raise ConfigError("restorer is for training decoders alone; set freeze_encoders=True, or remove it")
    if settings.restorer and settings.mixed_strategy:
        remedy = "list sizes of 1 frame in the dataset, or remove restorer"
        raise ConfigError(f"restorer takes clips as they are, but mixed_strategy cuts them; {remedy}")
    for name in ("mean_color_loss_weight", "latent_statistics_loss_weight"):
        if getattr(settings, name) and (settings.freeze_encoders or not temporal):
            remedy = "set use_z_rec_loss or use_real_rec_loss and no freeze_encoders, or remove it"
            raise ConfigError(f"{name} is for training temporal encoders; {remedy}")
    if settings.plugin == "zero2-seq" and settings.sp_size == 1:
        remedy = "set sp_size to 2 or more, or plugin='zero2'"
        raise ConfigError(f"plugin 'zero2-seq' divides each clip among sp_size ranks, but sp_size is 1; {remedy}")
