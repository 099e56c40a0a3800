"""Command lines of inference and training, merged over a configuration file. The command line wins."""

from __future__ import annotations

import argparse
import ast
import copy
import logging
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

from opensora.config import find_config, read_config
from opensora.errors import ConfigError, OpenSoraError
from opensora.settings import InferenceSettings, TrainSettings

logger = logging.getLogger("opensora")


def boolean(text: str | bool) -> bool:
    """True for true, t, yes, y, 1; False for false, f, no, n, 0 (any case); argparse.ArgumentTypeError otherwise."""
    word = str(text).lower()
    if word in ("true", "t", "yes", "y", "1"):
        return True
    if word in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


class Flag(NamedTuple):
    """One command line flag. `type` None makes it a switch.

    `goes_to` lists the settings it sets, by default the one of its own name; `section.key?` only if there is a section.
    """

    name: str
    type: Any
    help: str
    nargs: int | str | None = None
    goes_to: tuple[str, ...] = ()

    @property
    def dest(self) -> str:
        return self.name.replace("-", "_")

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        if self.type is None:
            parser.add_argument(f"--{self.name}", action="store_true", default=None, help=self.help)
        else:
            const = True if self.nargs == "?" else None
            parser.add_argument(f"--{self.name}", type=self.type, nargs=self.nargs, const=const, help=self.help)


SHARED = (
    Flag("seed", int, "random seed"),
    Flag("ckpt-path", str, "weights of the model", None, ("model.from_pretrained", "discriminator.from_pretrained?")),
    Flag("batch-size", int, "samples computed together"),
    Flag("outputs", str, "folder of training runs"),
    Flag("flash-attn", boolean, "for old commands", None, ("model.enable_flash_attn",)),
    Flag("layernorm-kernel", boolean, "for old commands", None, ("model.enable_layernorm_kernel",)),
    Flag("resolution", str, "name of a size, such as 240p or 720p"),
    Flag("data-path", str, "table of the data set", None, ("dataset.data_path",)),
    Flag("dtype", str, "bf16, fp16 or fp32"),
)
INFERENCE = (
    Flag("save-dir", str, "folder for the results"),
    Flag("sample-name", str, "results are named {sample-name}_0000 instead of sample_0000"),
    Flag("start-index", int, "first prompt to use"),
    Flag("end-index", int, "the prompt to stop before"),
    Flag("num-sample", int, "results for each prompt"),
    Flag("prompt-as-path", None, "name the results after their prompts"),
    Flag("verbose", int, "0 hides the progress of sampling"),
    Flag("prompt-path", str, "text file with one prompt a line"),
    Flag("prompt", str, "prompts", "+"),
    Flag("llm-refine", boolean, "let a language model refine the prompts"),
    Flag("prompt-generator", str, "program that makes prompts"),
    Flag("num-frames", str, "number of frames, or 4s; 1 makes an image", None, ("num_frames", "dataset.num_frames?")),
    Flag("fps", int, "frame rate that the model is told"),
    Flag("save-fps", int, "frame rate of the saved video"),
    Flag("image-size", int, "height and width; wins over --resolution", 2, ("image_size", "dataset.image_size?")),
    Flag("frame-interval", int, "step between source frames; divides the saved rate unless save-fps is set"),
    Flag("aspect-ratio", str, "height:width, such as 9:16 for landscape"),
    Flag("watermark", boolean, "draw the watermark"),
    Flag("num-sampling-steps", int, "steps of the sampler", None, ("scheduler.num_sampling_steps",)),
    Flag("cfg-scale", float, "strength of classifier-free guidance", None, ("scheduler.cfg_scale",)),
    Flag("loop", int, "clips to chain into one long video"),
    Flag("condition-frame-length", int, "latent frames that each clip takes over from the one before"),
    Flag("reference-path", str, "reference images or videos, one entry for each prompt", "+"),
    Flag("mask-strategy", str, "where the references go, one entry for each prompt", "+"),
    Flag("aes", float, "aesthetic score added to the prompt"),
    Flag("flow", float, "motion score added to the prompt"),
    Flag("camera-motion", str, "camera motion added to the prompt"),
)
TRAINING = (
    Flag("lr", float, "learning rate"),
    Flag("wandb", lambda text: bool(text) and boolean(text), "log to Weights & Biases", "?"),
    Flag("load", str, "checkpoint folder to resume from"),
    Flag("start-from-scratch", None, "load the weights of --load only, not its position in the data"),
    Flag("warmup-steps", int, "steps of linear warm-up"),
)
ADDED = (
    Flag("device", str, "device to run on, such as cpu, cuda or mps"),
    Flag("offline", None, "never download anything"),
    Flag("vae-path", str, "weights of the autoencoder", None, ("vae.from_pretrained",)),
    Flag("text-encoder-path", str, "weights of the text encoder", None, ("text_encoder.from_pretrained",)),
)
PREVIEW = Flag("preview", None, "also save a contact sheet of each video")
_OURS = {"trust_config", "cfg_options", *(flag.dest for flag in (*ADDED, PREVIEW))}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes `--prompt_path` for `--prompt-path`, and values such as `-1,0`.

    An abbreviation means a published flag before one of ours, so that `--cfg 7` stays `--cfg-scale 7`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # the rule of Python 3.14, for all versions

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        name, equals, value = option_string.partition("=")
        name = name.replace("_", "-")
        found = super()._get_option_tuples(name + equals + value)
        exact = [option for option in found if option[1] == name]
        return exact or [option for option in found if option[0].dest not in _OURS] or found


def add_inference_flags(parser: argparse.ArgumentParser) -> None:
    """Adds every inference flag but the configuration; `parser` should be a `Parser`."""
    _add_flags(parser, (*SHARED, *INFERENCE, *ADDED, PREVIEW))


def inference_parser() -> Parser:
    """The command line of scripts/inference.py."""
    parser = Parser(description="Generate images and videos from text, images or videos.")
    parser.add_argument("config", help="configuration file, or its name below configs/")
    add_inference_flags(parser)
    return parser


def training_parser() -> Parser:
    """The command line of scripts/train.py, train_vae.py and misc/search_bs.py."""
    parser = Parser(description="Train a model.")
    parser.add_argument("config", help="configuration file, or its name below configs/")
    _add_flags(parser, (*SHARED, *TRAINING, *ADDED))
    return parser


def parse_inference_args(argv: Sequence[str] | None = None) -> InferenceSettings:
    """The settings of an inference command line. Raises ConfigError; argparse exits with 2 on a wrong flag."""
    return inference_settings(inference_parser().parse_args(argv))


def parse_train_args(argv: Sequence[str] | None = None) -> TrainSettings:
    """The settings of a training command line. Raises ConfigError; argparse exits with 2 on a wrong flag."""
    args = training_parser().parse_args(argv)
    path = find_config(args.config)
    return TrainSettings.from_config(merge(read_config(path, trust=args.trust_config), args), path.name)


def inference_settings(args: argparse.Namespace) -> InferenceSettings:
    """The settings of parsed flags over the file `args.config`; positional `args.prompts` come before `--prompt`."""
    if getattr(args, "prompts", None):
        args = argparse.Namespace(**{**vars(args), "prompt": [*args.prompts, *(args.prompt or [])]})
    path = find_config(args.config)
    return InferenceSettings.from_config(merge(read_config(path, trust=args.trust_config), args), path.name)


def merge(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """`config` with every given flag of `args` in its place; unset flags (None) leave the configuration alone.

    Raises ConfigError when a flag belongs into a section that the configuration does not have.
    """
    merged = copy.deepcopy(config)
    for flag in (*SHARED, *INFERENCE, *TRAINING, *ADDED, PREVIEW):
        value = getattr(args, flag.dest, None)
        if value is not None:
            for target in flag.goes_to or (flag.dest,):
                _place(merged, target, value, flag)
    for option in getattr(args, "cfg_options", None) or []:
        _override(merged, option)
    _tell_what_wins(merged, args)
    return merged


def _add_flags(parser: argparse.ArgumentParser, flags: Iterable[Flag]) -> None:
    for flag in flags:
        flag.add_to(parser)
    parser.add_argument("--trust-config", action="store_true", help="run the configuration as a program")
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", help="other settings, such as model.depth=4")


def _place(config: dict[str, Any], target: str, value: Any, flag: Flag) -> None:
    section, _, key = target.removesuffix("?").rpartition(".")
    if not section:
        config[key] = value
    elif isinstance(config.get(section), dict):
        config[section][key] = value
    elif key in config and section == "dataset":
        config[key] = value  # 1.0 kept the data settings at the top level
    elif not target.endswith("?"):
        raise ConfigError(f"--{flag.name} sets {target}, but the configuration has no {section}")


def _override(config: dict[str, Any], option: str) -> None:
    """Sets one dotted `key=value`; the value is a Python literal, or else a text."""
    path, equals, text = option.partition("=")
    *sections, key = path.split(".")
    if not equals or not all((*sections, key)):
        raise ConfigError(f"--cfg-options takes key=value, such as model.depth=4; it got {option!r}")
    for section in sections:
        config = config.setdefault(section, {})
        if not isinstance(config, dict):
            raise ConfigError(f"--cfg-options {option}: '{section}' is not a section")
    try:
        config[key] = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError):
        config[key] = text


def _tell_what_wins(merged: dict[str, Any], args: argparse.Namespace) -> None:
    """Warns where a setting has no effect because another one decides."""
    given = {name for name, value in vars(args).items() if value is not None}
    size = merged.get("image_size")
    asked = given & {"resolution", "aspect_ratio"} or ("resolution" in merged and "image_size" not in given)
    if hasattr(args, "image_size") and size and asked:
        logger.warning("image_size %s decides the size; resolution and aspect_ratio have no effect", size)
    if merged.get("save_fps") and given & {"fps", "frame_interval"} and "save_fps" not in given:
        logger.warning("videos are saved at save_fps %s; --save-fps changes it, --fps does not", merged["save_fps"])


def run_program(program: Callable[[], Any]) -> int:
    """The exit code of a program: its own number or 0; 1 after a user's error, told in one line; 130 after Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "httpx2", "transformers", "diffusers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        result = program()
    except OpenSoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left", file=sys.stderr)
        return 130
    return result if isinstance(result, int) else 0
