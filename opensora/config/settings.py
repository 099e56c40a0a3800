"""What a run is asked to do: frozen, checked dataclasses built from a configuration.

Each field is declared once, with its check, its flag and its place in docs/config.md. Sizes and durations stay as
written ("480p", "4s"); the pipeline resolves them with `datasets.aspect`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from opensora.config.fields import Checked, Settings, one_of, setting
from opensora.config.legacy import OF_NO_EFFECT, gathered
from opensora.config.schema import FilePath, Int, Name, Number, Pair, Positive, Share, Text, worded
from opensora.config.sections.common import MAX_FRAMES, MAX_SIDE, MAX_STEPS
from opensora.config.sections.data import BucketConfig, CacheTable, MaskRatios
from opensora.errors import ConfigError

__all__ = [
    "OF_NO_EFFECT",
    "ExtractSettings",
    "InferenceSettings",
    "SearchSettings",
    "Settings",
    "TrainSettings",
    "setting",
]

SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32"}
DTYPES = one_of("bf16", "bfloat16", "fp16", "float16", "half", "fp32", "float32", "float64")
CACHES = one_of("none", "auto", "table", "tea", "mag")
RANKS = one_of("auto", "together", "apart")
LINEAR = one_of("exact", "int8", "fp8")
MEMORY = one_of("auto", "fast", "balanced", "low")
BAD_STEPS = one_of("skip", "rollback", "stop")
METHODS = one_of("model", "bisect", "grid")
_SIDES = f"(height, width) in pixels, 1 to {MAX_SIDE} each"
ImageSize = Annotated[Pair[Annotated[Positive, Field(le=MAX_SIDE)]], worded(_SIDES)]
Betas = Annotated[Pair[Annotated[Number, Field(ge=0, lt=1)]], worded("two numbers from 0 to below 1")]
Interval = Annotated[Pair[Share], worded("two rising numbers from 0 to 1")]
Bucket = Annotated[Pair[Name | Int], worded("(resolution, number of frames)")]
Seconds = Annotated[Number, Field(gt=0, le=1e9)]
Refined = dict[Text, Text]
NumFrames = Annotated[Text, Field(max_length=100)] | Annotated[Positive, Field(le=MAX_FRAMES)]
# Settings of the documents that training, or that of autoencoders, cannot follow; their defaults ask for nothing.
NOT_YET_IN_TRAINING = ("discriminator", "use_image_identity_loss")
NOT_YET_IN_VAE_TRAINING = (
    *NOT_YET_IN_TRAINING, "sp_size", "grad_checkpoint", "bucket_config", "mask_ratios", "accumulation_steps",
    "load_video_features", "load_text_features",
)  # fmt: skip


def check_trainable(settings: TrainSettings, unable: Sequence[str] = NOT_YET_IN_TRAINING) -> None:
    """Raises ConfigError when the settings ask for something that training would not do."""
    for name in unable:
        if getattr(settings, name) != getattr(TrainSettings, name):
            raise ConfigError(f"{name} is not supported by training yet; leave it out")
    if settings.plugin == "zero2-seq" and settings.sp_size == 1:
        remedy = "set sp_size to 2 or more, or plugin='zero2'"
        raise ConfigError(f"plugin 'zero2-seq' divides each clip among sp_size ranks, but sp_size is 1; {remedy}")


@dataclass(frozen=True, kw_only=True)
class _Settings(Checked):
    """Fields that inference and training share; a wrong value raises ConfigError on construction."""

    model: dict = setting(about="the diffusion model, or the autoencoder to train", example={"type": "STDiT3-XL/2"})
    vae: dict | None = setting(None, about="the autoencoder", example={"type": "OpenSoraVAE_V1_2"})
    text_encoder: dict | None = setting(None, about="what reads the prompts", example={"type": "t5"})
    scheduler: dict | None = setting(None, about="how noise becomes data", example={"type": "rflow"})
    dataset: dict | None = setting(None, about="what to train on", example={"type": "VideoTextDataset"})
    dtype: str = setting("bf16", "bf16, fp16 or fp32", kind=DTYPES)
    seed: int = setting(1024, "random seed")
    device: str | None = setting(None, "device to run on, such as cpu, cuda or mps", kind=Name, example="cuda")
    offline: bool = setting(False, "never ask the network for anything", nargs=0)
    num_workers: int = setting(4, least=0, most=1_024, about="processes that read the data")
    resolution: str | None = setting(None, "name of a size, such as 240p or 720p", kind=Name, example="480p")
    image_size: tuple[int, int] | None = setting(None, kind=ImageSize, about="height and width", example=(256, 256))
    perceptual_loss_weight: float = setting(0.1, least=0, about="of autoencoders: weight of the perceptual loss")
    kl_loss_weight: float = setting(1e-6, least=0, about="of autoencoders: weight of the KL divergence")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dtype", SHORT_DTYPES.get(self.dtype, self.dtype))


@dataclass(frozen=True, kw_only=True)
class InferenceSettings(_Settings):
    """One generation request. `image_size` (height, width) decides over `resolution` and `aspect_ratio`."""

    without_effect = ("num_workers", "perceptual_loss_weight", "kl_loss_weight", "dataset", "outputs")

    num_frames: str | int = setting(help="number of frames, or 4s; 1 makes an image", kind=NumFrames, example="4s")
    image_size: tuple[int, int] | None = setting(
        None, "height and width; wins over --resolution", kind=ImageSize, example=(256, 256)
    )
    save_dir: str = setting("./samples", "folder for the results", kind=FilePath)
    output: str | None = setting(
        None, "file for the one result; wins over --save-dir", kind=FilePath, example="circle.mp4"
    )
    overwrite: bool = setting(False, "replace results of the same name instead of taking the next number", nargs=0)
    fps: int | float = setting(24, "frame rate that the model is told", least=1, most=1_000)
    frame_interval: int = setting(
        1, "step between source frames; divides the saved rate without save-fps", least=1, most=1_000
    )
    save_fps: int | float | None = setting(None, "frame rate of the saved video", least=1, most=1_000, example=24)
    aspect_ratio: str | None = setting(None, "height:width, such as 9:16 for landscape", kind=Name, example="9:16")
    prompt: Sequence[str] | None = setting(None, "prompts", example=["a red circle moving right"])
    prompt_path: str | None = setting(
        None, "text file with one prompt a line", kind=FilePath, example="assets/texts/t2v_samples.txt"
    )
    negative_prompt: str | None = setting(
        None, "what guidance leads away from, instead of the model's null text", example="blurred, low quality"
    )
    prompt_as_path: bool = setting(False, "name the results after their prompts", nargs=0)
    allow_downloads: bool = setting(False, "fetch what a prompt file, recipe or draft names", nargs=0)
    prompt_generator: str = setting("", "program that makes prompts", kind=Name)
    llm_refine: bool = setting(False, "let a language model refine the prompts")
    llm_base_url: str | None = setting(
        None, "its server, such as http://localhost:8000/v1; else OPENAI_BASE_URL", kind=Name,
        example="http://localhost:8000/v1",
    )  # fmt: skip
    llm_model: str | None = setting(None, "its name; else OPENAI_MODEL", kind=Name, example="gpt-4o")
    refined: dict | None = setting(
        None, kind=Refined, about="what it answered: text of a prompt -> the text in its place; recipes hold it",
        example={"a cat": "a grey cat on a sofa"},
    )  # fmt: skip
    start_index: int = setting(0, "first prompt to use", least=0)
    end_index: int | None = setting(None, "the prompt to stop before", example=10)
    num_sample: int = setting(1, "results for each prompt", least=1, most=100_000)
    sample_name: str | None = setting(
        None, "results are named {sample-name}_0000 instead of sample_0000", kind=Name, example="cat"
    )
    batch_size: int = setting(
        1, "requests that are denoised together: faster, more memory, the same bytes", least=1, most=100_000
    )
    multi_resolution: str | None = setting(
        None, kind=Name, about="size conditioning of the model: STDiT2, OpenSora or PixArtMS", example="STDiT2"
    )
    aes: float | None = setting(None, "aesthetic score added to the prompt", example=6.5)
    flow: float | None = setting(None, "motion score added to the prompt", example=20.0)
    camera_motion: str | None = setting(None, "camera motion added to the prompt", kind=Name, example="pan left")
    loop: int = setting(1, "clips to chain into one long video", least=1, most=10_000)
    condition_frame_length: int = setting(
        5, "latent frames that each clip takes over from the one before", least=0, most=1_000
    )
    condition_frame_edit: float = setting(0.0, least=0, most=1, about="how much of these changes: 0 keeps them")
    align: int | None = setting(
        None, least=1, most=1_000, about="latent frames that references are cut to multiples of", example=5
    )
    reference_path: Sequence[str] | None = setting(
        None, "reference images or videos, one entry for each prompt", example=["cat.png"]
    )
    mask_strategy: Sequence[str] | None = setting(
        None, "where the references go, one entry for each prompt", example=["0,0,0,0,1"]
    )
    image: str | None = setting(None, "image that the video begins with", example="cat.png")
    first_frame: str | None = setting(None, "image that the video begins with", example="cat.png")
    last_frame: str | None = setting(None, "image that the video ends with", example="dog.png")
    extend: str | None = setting(None, "video to go on from", example="clip.mp4")
    keep: str | None = setting(None, "how much of its end to keep, in frames or as 1s", kind=Name, example="1s")
    edit: str | None = setting(None, "video to repaint", example="clip.mp4")
    strength: float | None = setting(None, "how much of it changes, 0 to 1", least=0, most=1, example=0.7)
    watermark: bool | str = setting(False, "write 'AI generated' on the frames; other texts as watermark='...'")
    preview: bool = setting(False, "also save a contact sheet of each video", nargs=0)
    verbose: int = setting(1, "0 hides the progress of sampling", least=0, most=100)
    steps_until: int | None = setting(
        None, "stop after so many steps; opensora continue does the rest", least=1, most=MAX_STEPS, example=10
    )
    draft: bool = setting(False, "the same, after about a third of the steps", nargs=0)
    cache: str = setting("none", "foretell some of the model's evaluations: none, auto, table, tea or mag", kind=CACHES)
    max_error: float = setting(0.02, "most that --cache auto may change the latents, relative to their size", least=0)
    cache_threshold: float | None = setting(None, "of tea and mag: how much change to let pass", least=0, example=0.1)
    cache_prompts: Sequence[str] | None = setting(
        None, "prompts that --cache auto tries itself on", example=["a cat", "a city at night"]
    )
    cache_table: dict | None = setting(
        None, kind=CacheTable, about="what is computed in each evaluation; recipes hold it",
        example={"halves": "2", "text": [[1.0, 0.0]], "guidance": [[1.0, 0.0]]},
    )  # fmt: skip
    cache_psnr: bool = setting(False, "also make each result without cache and guidance interval, and compare", nargs=0)
    guidance_interval: tuple[float, float] | None = setting(
        None, "part of the run with guidance, such as 0.1 0.8", kind=Interval, example=(0.1, 0.8)
    )
    guidance_ranks: str = setting(
        "auto", "on several ranks, its halves on half of them each: auto, together or apart", kind=RANKS
    )
    attention: str | None = setting(
        None, "attention of an installed package that PyTorch knows, such as FA3", kind=Name, example="FA3"
    )
    cpu_dtype: str = setting(
        "fp32", "what a CPU computes in, whatever --dtype: fp32, or bf16, fast on some", kind=one_of("fp32", "bf16")
    )
    linear: str = setting("exact", "linear layers of the model's blocks: exact, or in 8 bits, int8 or fp8", kind=LINEAR)
    memory: str = setting("auto", "memory to take: fast (most), balanced, low, or auto: what fits", kind=MEMORY)
    compile: bool = setting(False, "compile the model's blocks: the first step takes a minute", nargs=0)
    graphs: bool = setting(False, "record a step on the accelerator once and replay it: for small sizes", nargs=0)
    outputs: str | None = setting(None, "folder of training runs", kind=FilePath, example="outputs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.watermark, str) and self.watermark.lower() in ("true", "false"):
            raise ConfigError(f"watermark must be True or False, or the text to write; it is {self.watermark!r}")
        part = self.guidance_interval
        if part is not None and not part[0] < part[1]:
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

    discriminator: dict | None = setting(
        None, about="of autoencoders; not supported by training yet", example={"type": "N_Layer_discriminator_3D"}
    )
    bucket_config: dict | None = setting(
        None, kind=BucketConfig, example={"480p": {1: (1.0, 4), 51: ((0.5, 0.3), 1)}},
        about="resolution -> frames -> (keep, batch size); keep may be (keep this size, cut to these frames)",
    )  # fmt: skip
    mask_ratios: dict | None = setting(
        None, kind=MaskRatios, example={"identity": 0.9, "image_head": 0.1},
        about="which frames are given: kind of mask -> share of the clips",
    )  # fmt: skip
    num_frames: int | None = setting(None, least=1, most=MAX_FRAMES, about="frames of a clip, of 1.0", example=16)
    batch_size: int | None = setting(None, "samples computed together", least=1, most=100_000, example=8)

    outputs: str = setting("outputs", "folder of training runs", kind=FilePath)
    wandb: bool = setting(False, "log to Weights & Biases", nargs="?")
    tensorboard: bool = setting(True, "write event files for tensorboard, if it is installed", nargs="?")
    load: str | None = setting(
        None, "folder of a run or checkpoint to go on from, or auto: the newest that fits", kind=FilePath,
        example="outputs/000-STDiT3-XL-2/epoch0-global_step500",
    )  # fmt: skip
    start_from_scratch: bool = setting(False, "take all of --load but its position in the data", nargs=0)
    accept_changes: bool = setting(False, "go on from --load with other data or settings, and say which", nargs=0)
    epochs: int = setting(1000, least=1, about="passes over the data")
    max_steps: int | None = setting(None, least=1, about="steps after which the run ends", example=20_000)
    max_minutes: float | None = setting(None, least=0, about="minutes after which the run ends", example=60)
    log_every: int = setting(1, least=1, about="steps between lines of the log")
    ckpt_every: int = setting(0, least=0, about="steps between checkpoints; 0: only at the end")
    keep_checkpoints: int | None = setting(
        None, least=1, example=3, about="newest checkpoints that are kept; None: as many as the run has kept, or 2"
    )
    validate_every: int = setting(0, "steps between validations on clips that are held out; 0: none", least=0)
    validation_samples: int = setting(16, "clips of each bucket that are held out for it", least=1, most=1_000_000)
    sample_every: int = setting(0, "steps between videos of --sample-prompts; 0: none", least=0)
    sample_prompts: Sequence[str] | None = setting(None, "prompts of these videos", example=["a cat"])
    on_bad_step: str = setting(
        "skip", "skip, rollback or stop when a step is not finite or its gradients jump", kind=BAD_STEPS
    )
    max_bad_steps: int = setting(10, "stop after so many bad steps in a row", least=1)
    spike_factor: float = setting(20.0, "gradients jump above so many times their median; 0: they may", least=0)

    lr: float = setting(1e-4, "learning rate", least=0)
    lr_schedule: str = setting("constant", kind=one_of("constant", "cosine"), about="course of the learning rate")
    warmup_steps: int | None = setting(None, "steps of linear warm-up", least=0, example=1000)
    weight_decay: float = setting(0.0, least=0, about="of AdamW")
    adam_betas: tuple[float, float] = setting((0.9, 0.999), kind=Betas, about="of AdamW")
    adam_eps: float = setting(1e-8, least=0, about="of AdamW")
    grad_clip: float = setting(0.0, least=0, about="norm that gradients are cut to; 0: they are not")
    accumulation_steps: int = setting(1, "batches whose gradients are added up for one step", least=1, most=1_000_000)
    ema_decay: float = setting(0.9999, least=0, most=1, about="of the averaged weights")
    grad_checkpoint: bool = setting(False, about="compute activations again in the backward pass: less memory")
    compile: bool = setting(False, about="compile the model's blocks")
    plugin: str = setting("zero2", kind=one_of("zero2", "zero2-seq"), about="zero2-seq divides clips among ranks")
    sp_size: int = setting(1, least=1, most=10_000, about="ranks that share a clip, with zero2-seq")

    load_video_features: bool = setting(False, about="train on encoded clips; a dataset of type EncodedDataset does")
    load_text_features: bool = setting(False, about="train on encoded texts; a dataset of type EncodedDataset does")
    mixed_strategy: str | None = setting(
        None, kind=one_of("mixed_video_image", "mixed_video_random"), example="mixed_video_image",
        about="of autoencoders: clips cut to their first frame, or to a random length",
    )  # fmt: skip
    mixed_image_ratio: float = setting(0.0, least=0, most=1, about="share of the steps that mixed_video_image cuts")
    use_real_rec_loss: bool = setting(False, about="of autoencoders: compare with the pictures")
    use_z_rec_loss: bool = setting(False, about="of autoencoders: compare with the image autoencoder's latents")
    use_image_identity_loss: bool = setting(False, about="of autoencoders; not supported by training yet")
    freeze_encoders: bool = setting(False, about="of autoencoders: train the decoders alone")

    @classmethod
    def from_config(cls: type[Settings], config: dict[str, Any], source: str) -> Settings:
        """Also gathers the data settings that 1.0 kept at the top level into `dataset`."""
        return super().from_config(gathered(config, source), source)


@dataclass(frozen=True, kw_only=True)
class SearchSettings(TrainSettings):
    """One search for batch sizes: a training whose `bucket_config` has (guess, range), and what to aim at."""

    base: tuple[str, str | int] | None = setting(
        None, kind=Bucket, about="the bucket whose step sets base_step_time", example=("240p", 51)
    )
    base_step_time: float | None = setting(
        None, "seconds that a step of each bucket should take", kind=Seconds, example=12.0
    )
    method: str = setting("model", "model (few trials), bisect (as in 1.2) or grid (as in 1.1)", kind=METHODS)
    untimed_steps: int = setting(5, "steps of a trial before the clock starts", least=0, most=10_000)
    active_steps: int = setting(5, "steps of a trial that are timed", least=1, most=10_000)
    output: str | None = setting(
        None, "configuration to write; default: search_bs.py in the folder of outputs", kind=FilePath,
        example="search_bs.py",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(TrainSettings):
    """What is encoded, and where it goes. Settings of training have no effect but those of the data set."""

    model: dict | None = None
    save_dir: str = setting("features", "folder for the features", kind=FilePath)
    start_index: int = setting(0, "first row of the table to encode", least=0)
    end_index: int | None = setting(None, "the row to stop before", example=1000)
    crops: int = setting(1, least=1, most=10_000, about="spans of each clip, drawn as in so many epochs")
    bin_size: int = setting(250, least=1, about="samples of a shard, at most")
    save_video_features: bool = setting(True, about="encode the clips")
    save_text_features: bool = setting(True, about="encode the texts")
    save_compressed_text_features: bool = setting(True, about="accepted; padding is never stored")
    save_last_frames: bool = setting(True, about="also store the last frames, for training on continued clips")
    save_dtype: str = setting("fp16", kind=one_of("fp16", "bf16", "fp32"), about="number format of the features")
    replace_stale: bool = setting(False, about="encode again what does not belong to the table any more")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.save_video_features or self.save_text_features):
            raise ConfigError("save_video_features and save_text_features are both off; there is nothing to encode")
