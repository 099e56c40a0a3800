"""Command lines of inference and training, merged over a configuration file. The command line wins."""

from __future__ import annotations

import argparse
import ast
import copy
import logging
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from typing import Any, NoReturn

from opensora.config import load_config
from opensora.errors import ConfigError, OpenSoraError
from opensora.settings import InferenceSettings, SearchSettings, Settings, TrainSettings

logger = logging.getLogger("opensora")


def boolean(text: str | bool) -> bool:
    """True for true, t, yes, y, 1; False for false, f, no, n, 0 (any case); argparse.ArgumentTypeError otherwise."""
    word = str(text).lower()
    if word not in ("true", "t", "yes", "y", "1", "false", "f", "no", "n", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return word in ("true", "t", "yes", "y", "1")


# Settings have flags of their own names. These flags set a part of a section: type, help, where to.
SECTION_FLAGS = {
    "ckpt_path": (str, "weights of the model", "model.from_pretrained"),
    "flash_attn": (boolean, "for old commands", "model.enable_flash_attn"),
    "layernorm_kernel": (boolean, "for old commands", "model.enable_layernorm_kernel"),
    "data_path": (str, "table of the data set", "dataset.data_path"),
    "vae_path": (str, "weights of the autoencoder", "vae.from_pretrained"),
    "text_encoder_path": (str, "weights of the text encoder", "text_encoder.from_pretrained"),
}
SAMPLING_FLAGS = {
    "num_sampling_steps": (int, "steps of the sampler", "scheduler.num_sampling_steps"),
    "cfg_scale": (float, "strength of classifier-free guidance", "scheduler.cfg_scale"),
}
# Flags that also set a part of another section, if there is one.
COPIES = {
    "ckpt_path": "discriminator.from_pretrained",
    "num_frames": "dataset.num_frames",
    "image_size": "dataset.image_size",
}
READ_AS = {
    "int": {"type": int}, "float": {"type": float}, "str": {"type": str}, "bool": {"type": boolean},
    "Sequence[str]": {"type": str, "nargs": "+"}, "tuple[int, int]": {"type": int, "nargs": 2},
    "tuple[float, float]": {"type": float, "nargs": 2},
}  # fmt: skip
_OURS = {
    "trust_config", "cfg_options", "device", "offline", "vae_path", "text_encoder_path", "preview",
    "image", "first_frame", "last_frame", "extend", "keep", "edit", "strength", "llm_base_url", "llm_model",
    "steps_until", "draft", "cache", "max_error", "cache_threshold", "cache_prompts", "cache_psnr",
    "guidance_interval", "guidance_ranks",
    "memory", "linear", "attention",
}  # fmt: skip


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


def inference_parser() -> Parser:
    """The command line of scripts/inference.py."""
    parser = Parser(description="Generate images and videos from text, images or videos.")
    parser.add_argument("config", help="configuration file, or its name below configs/")
    add_flags(parser, InferenceSettings)
    return parser


def training_parser() -> Parser:
    """The command line of scripts/train.py and train_vae.py."""
    parser = Parser(description="Train a model.")
    parser.add_argument("config", help="configuration file, or its name below configs/")
    add_flags(parser, TrainSettings)
    return parser


def search_parser() -> Parser:
    """The command line of scripts/misc/search_bs.py."""
    parser = Parser(description="Search the batch size of each bucket.")
    add_search(parser)
    return parser


def add_search(parser: argparse.ArgumentParser) -> None:
    """Adds all arguments of a search to `parser`, which should be a `Parser`."""
    parser.add_argument("config", help="configuration file, or its name below configs/")
    add_flags(parser, SearchSettings)
    parser.add_argument("-o", dest="output", help="the same as --output")


def add_flags(parser: argparse.ArgumentParser, kind: type[Settings]) -> None:
    """Adds every flag of these settings but the configuration; `parser` should be a `Parser`."""
    for field in fields(kind):
        if field.metadata.get("help"):
            parser.add_argument(_option(field.name), help=field.metadata["help"], **_values(field))
    sections = SECTION_FLAGS | (SAMPLING_FLAGS if kind is InferenceSettings else {})
    for name, (convert, text, _) in sections.items():
        parser.add_argument(_option(name), help=text, type=convert)
    parser.add_argument("--trust-config", action="store_true", help="run the configuration as a program")
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", help="other settings, such as model.depth=4")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _values(field: Field) -> dict[str, Any]:
    """How argparse reads the values of a setting's flag; a flag that is not given is None."""
    nargs = field.metadata["nargs"]
    if nargs == 0:
        return {"action": "store_true", "default": None}
    if nargs == "?":  # alone it means True, and an empty text False
        return {"type": lambda text: bool(text) and boolean(text), "nargs": "?", "const": True}
    return READ_AS[field.type.split(" | ")[0]]


def parse_inference_args(argv: Sequence[str] | None = None) -> InferenceSettings:
    """The settings of an inference command line. Raises ConfigError; argparse exits with 2 on a wrong flag."""
    return settings_of(InferenceSettings, inference_parser().parse_args(argv))


def parse_train_args(argv: Sequence[str] | None = None) -> TrainSettings:
    """The settings of a training command line. Raises ConfigError; argparse exits with 2 on a wrong flag."""
    return settings_of(TrainSettings, training_parser().parse_args(argv))


def parse_search_args(argv: Sequence[str] | None = None) -> SearchSettings:
    """The settings of a search's command line. Raises ConfigError; argparse exits with 2 on a wrong flag."""
    return settings_of(SearchSettings, search_parser().parse_args(argv))


def settings_of(kind: type[Settings], args: argparse.Namespace) -> Settings:
    """The settings of parsed flags over the file `args.config`. Raises ConfigError."""
    config, path = load_config(args.config, args.trust_config)
    merged = merge(config, args)
    if kind is InferenceSettings:
        _tell_what_wins(merged, _given(args))
    return kind.from_config(merged, path.name)


def merge(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """`config` with every given flag of `args` in its place; unset flags (None) leave the configuration alone.

    Raises ConfigError when a flag belongs into a section that the configuration does not have.
    """
    merged = copy.deepcopy(config)
    given = _given(args)
    settings = {field.name for field in (*fields(InferenceSettings), *fields(SearchSettings))}
    merged |= {name: value for name, value in given.items() if name in settings}
    if "prompt_path" in given and "prompt" not in given:
        merged.pop("prompt", None)  # the prompts of the file, which would win
    for name, (_, _, target) in (SECTION_FLAGS | SAMPLING_FLAGS).items():
        if name in given and not _place(merged, target, given[name]):
            section = target.partition(".")[0]
            raise ConfigError(f"{_option(name)} sets {target}, but the configuration has no {section}")
    for name in COPIES.keys() & given.keys():
        _place(merged, COPIES[name], given[name])
    for option in args.cfg_options or []:
        _override(merged, option)
    return merged


def _given(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if value is not None}


def _place(config: dict[str, Any], target: str, value: Any) -> bool:
    """Sets `section.key` of the configuration, if it has that section."""
    section, key = target.split(".")
    if isinstance(config.get(section), dict):
        config[section][key] = value
    elif section == "dataset" and key in config:
        config[key] = value  # 1.0 kept the data settings at the top level
    else:
        return False
    return True


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


def _tell_what_wins(merged: dict[str, Any], given: dict[str, Any]) -> None:
    """Warns where a setting has no effect because another one decides."""
    size = merged.get("image_size")
    asked = given.keys() & {"resolution", "aspect_ratio"} or ("resolution" in merged and "image_size" not in given)
    if size and asked:
        logger.warning("image_size %s decides the size; resolution and aspect_ratio have no effect", size)
    if merged.get("save_fps") and given.keys() & {"fps", "frame_interval"} and "save_fps" not in given:
        logger.warning("videos are saved at save_fps %s; --save-fps changes it, --fps does not", merged["save_fps"])


@contextmanager
def _ended_as_by_itself() -> Iterator[None]:
    """SIGTERM as an exception, so that what has been begun is put in order."""

    def end(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # no other may say what a signal does
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def run_program(program: Callable[[], Any]) -> int:
    """The exit code of a program: its own number or 0; 1 after a user's error, told in one line; 130 after Ctrl-C.

    One that is told to end (SIGTERM, by which torchrun ends the other ranks when one has failed) leaves nothing
    half-written either.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "httpx2", "transformers", "diffusers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        with _ended_as_by_itself():
            result = program()
    except OpenSoraError as error:
        sys.stderr.write(f"error: {error}\n")  # in one write: ranks share the stream
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing half-written was left\n")
        return 130
    return result if isinstance(result, int) else 0
