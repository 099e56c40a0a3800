"""Settings of a generation request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from opensora.config.fields import one_of, setting
from opensora.config.schema import FilePath, Name, Pair, Positive, Share, Text, described_as
from opensora.config.sections.common import MAX_FRAMES, MAX_STEPS
from opensora.config.sections.data import CacheTable
from opensora.config.settings.common import CommonSettings, ImageSize
from opensora.errors import ConfigError

CACHES = one_of("none", "auto", "table", "tea", "mag")
RANKS = one_of("auto", "together", "apart")
LINEAR = one_of("exact", "int8", "fp8")
MEMORY = one_of("auto", "fast", "balanced", "low")
Interval = Annotated[Pair[Share], described_as("two rising numbers from 0 to 1")]
NumFrames = Annotated[Text, Field(max_length=100)] | Annotated[Positive, Field(le=MAX_FRAMES)]


@dataclass(frozen=True, kw_only=True)
class InferenceSettings(CommonSettings):
    """One generation request. `image_size` (height, width) overrides `resolution` and `aspect_ratio`."""

    without_effect = ("num_workers", "perceptual_loss_weight", "kl_loss_weight", "dataset", "outputs")

    num_frames: str | int = setting(
        help="number of frames, or a duration such as 4s; 1 makes an image", schema=NumFrames, example="4s"
    )
    image_size: tuple[int, int] | None = setting(
        None, "height and width in pixels; overrides --resolution", schema=ImageSize, example=(256, 256)
    )
    save_dir: str = setting("./samples", "output folder", schema=FilePath)
    output: str | None = setting(
        None, "output file of a single result; overrides --save-dir", schema=FilePath, example="circle.mp4"
    )
    overwrite: bool = setting(False, "overwrite existing results instead of taking the next free number", nargs=0)
    fps: int | float = setting(24, "frame rate that the model is conditioned on", minimum=1, maximum=1_000)
    frame_interval: int = setting(
        1, "step between source frames; without --save-fps it divides the saved frame rate", minimum=1, maximum=1_000
    )
    save_fps: int | float | None = setting(None, "frame rate of the saved video", minimum=1, maximum=1_000, example=24)
    aspect_ratio: str | None = setting(None, "height:width, such as 9:16 for landscape", schema=Name, example="9:16")
    prompt: Sequence[str] | None = setting(None, "prompts", example=["a red circle moving right"])
    prompt_path: str | None = setting(
        None, "text file with one prompt per line", schema=FilePath, example="assets/texts/t2v_samples.txt"
    )
    negative_prompt: str | None = setting(
        None, "negative prompt, instead of the model's learned null text", example="blurred, low quality"
    )
    prompt_as_path: bool = setting(False, "name results after their prompts", nargs=0)
    allow_downloads: bool = setting(False, "download files that a prompt file, recipe or draft refers to", nargs=0)
    prompt_generator: str = setting("", "program that generates prompts", schema=Name)
    llm_refine: bool = setting(False, "rewrite prompts with a language model")
    llm_base_url: str | None = setting(
        None, "language model server, such as http://localhost:8000/v1; default: OPENAI_BASE_URL", schema=Name,
        example="http://localhost:8000/v1",
    )  # fmt: skip
    llm_model: str | None = setting(
        None, "name of the language model; default: OPENAI_MODEL", schema=Name, example="gpt-4o"
    )
    refined: dict | None = setting(
        None, schema=dict[Text, Text], doc="prompt -> rewritten text; recorded in recipes, which use it",
        example={"a cat": "a grey cat on a sofa"},
    )  # fmt: skip
    start_index: int = setting(0, "index of the first prompt to use", minimum=0)
    end_index: int | None = setting(None, "index of the prompt to stop before", example=10)
    num_sample: int = setting(1, "samples per prompt", minimum=1, maximum=100_000)
    sample_name: str | None = setting(
        None, "prefix of the file names: {sample-name}_0000 instead of sample_0000", schema=Name, example="cat"
    )
    batch_size: int = setting(
        1, "samples denoised together: faster, more memory, identical results", minimum=1, maximum=100_000
    )
    multi_resolution: str | None = setting(
        None, schema=Name, doc="size conditioning of the model: STDiT2, OpenSora or PixArtMS", example="STDiT2"
    )
    aes: float | None = setting(None, "aesthetic score appended to the prompt", example=6.5)
    flow: float | None = setting(None, "motion score appended to the prompt", example=20.0)
    camera_motion: str | None = setting(None, "camera motion appended to the prompt", schema=Name, example="pan left")
    loop: int = setting(1, "clips to chain into one long video", minimum=1, maximum=10_000)
    condition_frame_length: int = setting(
        5, "latent frames that each clip takes from the end of the previous one", minimum=0, maximum=1_000
    )
    condition_frame_edit: float = setting(
        0.0, minimum=0, maximum=1, doc="edit rate of those frames: 0 keeps them, 1 regenerates them"
    )
    align: int | None = setting(
        None, minimum=1, maximum=1_000, doc="round references to multiples of so many latent frames", example=5
    )
    reference_path: Sequence[str] | None = setting(
        None, "reference images or videos, one entry per prompt", example=["cat.png"]
    )
    mask_strategy: Sequence[str] | None = setting(
        None, "mask strategy: where the references go, one entry per prompt", example=["0,0,0,0,1"]
    )
    image: str | None = setting(None, "image for the first frame", example="cat.png")
    first_frame: str | None = setting(None, "same as --image", example="cat.png")
    last_frame: str | None = setting(None, "image for the last frame", example="dog.png")
    extend: str | None = setting(None, "video to extend", example="clip.mp4")
    keep: str | None = setting(
        None,
        "with --extend: how much of the video's end to condition on, in frames or as 1s",
        schema=Name,
        example="1s",
    )
    edit: str | None = setting(None, "video to edit", example="clip.mp4")
    strength: float | None = setting(
        None, "with --edit: edit strength, 0 (unchanged) to 1 (regenerated)", minimum=0, maximum=1, example=0.7
    )
    watermark: bool | str = setting(False, "write 'AI generated' on the frames; other texts as watermark='...'")
    preview: bool = setting(False, "also save a contact sheet of each video", nargs=0)
    verbose: int = setting(1, "0 hides the progress bar", minimum=0, maximum=100)
    steps_until: int | None = setting(
        None, "stop after this many steps and save a draft for opensora continue", minimum=1, maximum=MAX_STEPS,
        example=10,
    )  # fmt: skip
    draft: bool = setting(False, "stop after about a third of the steps and save a draft", nargs=0)
    lora: Sequence[str] | None = setting(
        None, "adapter files (LoRA), each FILE or FILE:STRENGTH", example=["style.safetensors:0.8"]
    )
    fuse_lora: bool = setting(False, "add the adapters to the weights: faster, more memory, other last bits", nargs=0)
    any_base: bool = setting(False, "use adapters that were trained on other weights than these", nargs=0)
    cache: str = setting(
        "none", "step cache, which skips model evaluations: none, auto, table, tea or mag", schema=CACHES
    )
    max_error: float = setting(0.02, "largest relative error of the latents that --cache auto accepts", minimum=0)
    cache_threshold: float | None = setting(
        None, "tea and mag caches: accumulated change above which the model is evaluated", minimum=0, example=0.1
    )
    cache_prompts: Sequence[str] | None = setting(
        None, "prompts that --cache auto calibrates on", example=["a cat", "a city at night"]
    )
    cache_table: dict | None = setting(
        None, schema=CacheTable, doc="step cache table: which evaluations are computed; recorded in recipes",
        example={"halves": "2", "text": [[1.0, 0.0]], "guidance": [[1.0, 0.0]]},
    )  # fmt: skip
    cache_psnr: bool = setting(
        False, "also generate each result without cache and guidance interval, and report the PSNR", nargs=0
    )
    guidance_interval: tuple[float, float] | None = setting(
        None, "part of the sampling that uses guidance, such as 0.1 0.8", schema=Interval, example=(0.1, 0.8)
    )
    guidance_ranks: str = setting(
        "auto", "several ranks: cond and uncond branches on half of the ranks each (apart) or on all (together)",
        schema=RANKS,
    )  # fmt: skip
    attention: str | None = setting(
        None, "attention of an installed package that PyTorch knows, such as FA3", schema=Name, example="FA3"
    )
    cpu_dtype: str = setting(
        "fp32", "number format on a CPU, whatever --dtype: fp32, or bf16 (fast on some processors)",
        schema=one_of("fp32", "bf16"),
    )  # fmt: skip
    linear: str = setting(
        "exact", "quantization of the model's linear layers: exact (none), int8 or fp8", schema=LINEAR
    )
    memory: str = setting(
        "auto", "memory plan: fast (most memory), balanced, low, or auto (the first that fits)", schema=MEMORY
    )
    compile: bool = setting(False, "compile the model's blocks; the first step then takes a minute", nargs=0)
    graphs: bool = setting(False, "capture a step as a CUDA graph and replay it; helps small sizes", nargs=0)
    outputs: str | None = setting(None, "folder of training runs", schema=FilePath, example="outputs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.watermark, str) and self.watermark.lower() in ("true", "false"):
            raise ConfigError(f"watermark must be True or False, or the text to write; it is {self.watermark!r}")
        interval = self.guidance_interval
        if interval is not None and not interval[0] < interval[1]:
            raise ConfigError(f"guidance_interval must be two rising numbers from 0 to 1; it is {interval!r}")
        if (self.draft or self.steps_until) and (self.cache != "none" or interval is not None):
            raise ConfigError("a draft cannot be continued with a cache or a guidance_interval; remove them")
        if self.cache_prompts is not None and len(self.cache_prompts) < 2:
            raise ConfigError("cache_prompts needs at least two prompts: one to learn from and one to try")

    @property
    def output_fps(self) -> float:
        """Frames per second of the saved video: `save_fps`, else `fps // frame_interval`."""
        return self.save_fps or max(self.fps // self.frame_interval, 1)
