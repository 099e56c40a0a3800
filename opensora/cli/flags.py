"""The flags of a command, made out of the fields of its settings: type, default, help, and the group they belong to."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from opensora.cli.parser import Parser
from opensora.config.settings import InferenceSettings, Settings
from opensora.errors import ConfigError

CONFIGURED = "as the configuration says"


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
    "captions": (str, "rows that must have a text: mostly, required or optional", "dataset.captions"),
    "vae_path": (str, "weights of the autoencoder", "vae.from_pretrained"),
    "text_encoder_path": (str, "weights of the text encoder", "text_encoder.from_pretrained"),
}
SAMPLING_FLAGS = {
    "num_sampling_steps": (int, "steps of the sampler", "scheduler.num_sampling_steps"),
    "cfg_scale": (float, "strength of classifier-free guidance", "scheduler.cfg_scale"),
}
# Other names of flags, as people know them from other programs.
ALIASES = {
    "num_sampling_steps": ("--steps", "--num-inference-steps"),
    "cfg_scale": ("--guidance-scale",),
    "loop": ("--loops",),
    "output": ("-o",),
}
# The documents' programs take these for inference, too; `opensora generate` does not.
OF_TRAINING = ("outputs", "data_path", "captions")
READ_AS = {
    "int": {"type": int}, "float": {"type": float}, "str": {"type": str}, "bool": {"type": boolean},
    "Sequence[str]": {"type": str, "nargs": "+"}, "tuple[int, int]": {"type": int, "nargs": 2},
    "tuple[float, float]": {"type": float, "nargs": 2},
}  # fmt: skip
NAMES = {int: "N", float: "X", str: "TEXT", boolean: "true|false"}  # of values
NAMED = {
    "image_size": ("H", "W"), "guidance_interval": ("FROM", "TO"), "aspect_ratio": "H:W", "num_frames": "N|4s",
    "keep": "N|1s", "fps": "N",
    **dict.fromkeys(("ckpt_path", "vae_path", "text_encoder_path"), "PATH"),
    **dict.fromkeys(("prompt_path", "output", "image", "first_frame", "last_frame", "extend", "edit"), "FILE"),
    **dict.fromkeys(("save_dir", "outputs", "load"), "FOLDER"), "data_path": "TABLE", "prompt": "PROMPT",
}  # fmt: skip


class Flag(NamedTuple):
    """A flag: the setting it sets, how it is read, what it does, and its value where it is not given."""

    name: str
    reading: dict[str, Any]
    help: str
    default: str


def flags_of(kind: type[Settings]) -> Iterator[Flag]:
    """Every flag of these settings."""
    for field in dataclasses.fields(kind):
        if field.metadata.get("help"):
            yield Flag(field.name, _reading(field), field.metadata["help"], _shown(field.default))
    for name, (convert, text, _) in (
        SECTION_FLAGS | (SAMPLING_FLAGS if issubclass(kind, InferenceSettings) else {})
    ).items():
        yield Flag(name, {"type": convert}, text, CONFIGURED)


def _reading(field: dataclasses.Field) -> dict[str, Any]:
    """How argparse reads the values of a setting's flag; a flag that is not given is None."""
    nargs = field.metadata["nargs"]
    if nargs == 0:
        return {"action": "store_true", "default": None}
    if nargs == "?":  # alone it means True, and an empty text False
        return {"type": lambda text: bool(text) and boolean(text), "nargs": "?", "const": True}
    return READ_AS[field.type.split(" | ")[0]]


def _shown(default: Any) -> str:
    if default is dataclasses.MISSING:
        return CONFIGURED
    if default is None or default == "":
        return "none"
    return {True: "yes", False: "no"}[default] if isinstance(default, bool) else str(default)


# Group of `generate --help` -> its flags; what follows `...` is shown by --help-all alone.
GROUPS: dict[str, tuple[Any, ...]] = {
    "what to make": (
        "prompt", "negative_prompt", "prompt_path", "num_sample", "seed", "model", ...,
        "start_index", "end_index", "aes", "flow", "camera_motion", "prompt_generator",
        "llm_refine", "llm_base_url", "llm_model", "cfg_options", "trust_config",
    ),
    "size and length": (
        "size", "width", "height", "resolution", "aspect_ratio", "num_frames", "image_size", "fps", ...,
        "save_fps", "frame_interval",
    ),
    "given images": (
        "image", "first_frame", "last_frame", "extend", "keep", "edit", "strength", ...,
        "reference_path", "mask_strategy",
    ),
    "sampling": ("num_sampling_steps", "cfg_scale", "steps_until", "draft", ..., "guidance_interval"),
    "long videos": ("loop", ..., "condition_frame_length"),
    "weights": ("ckpt_path", "vae_path", "text_encoder_path", "offline", ..., "allow_downloads"),
    "speed and memory": (
        "device", "dtype", "memory", "compile", ...,
        "batch_size", "graphs", "linear", "attention", "cpu_dtype", "guidance_ranks",
        "cache", "max_error", "cache_threshold", "cache_prompts", "cache_psnr", "flash_attn", "layernorm_kernel",
    ),
    "output": (
        "output", "save_dir", "sample_name", "overwrite", "preview", "watermark", ...,
        "prompt_as_path", "verbose", "outputs", "data_path", "captions",
    ),
}  # fmt: skip
GENERAL = (
    Flag("trust_config", {"action": "store_true"}, "run the configuration as a program", "no"),
    Flag("cfg_options", {"nargs": "+", "metavar": "KEY=VALUE"}, "other settings, such as model.depth=4; last", "none"),
)
SIZES = (  # as other programs spell them
    Flag("size", {"type": str, "metavar": "WxH"}, "width and height in pixels, such as 640x480", "none"),
    Flag("width", {"type": int}, "width in pixels, with --height", "none"),
    Flag("height", {"type": int}, "height in pixels, with --width", "none"),
)


def add_flags(parser: Parser, kind: type[Settings], documented: bool = True, more: Sequence[Flag] = ()) -> None:
    """Adds every flag of these settings but the configuration, and `more`.

    `documented`: also those that only the documents' programs take. Flags of inference come in groups, of which --help
    shows the common ones.
    """
    grouped = issubclass(kind, InferenceSettings)
    flags = [one for one in flags_of(kind) if documented or one.name not in OF_TRAINING]
    flags += [*GENERAL, *(SIZES if grouped else ()), *more]
    if grouped:
        order = [name for names in GROUPS.values() for name in names]
        flags.sort(key=lambda flag: order.index(flag.name) if flag.name in order else len(order))
    for flag in flags:
        _add(parser, flag, group_of(flag.name) if grouped else None)
    if grouped:
        parser.add_help_all()
    parser.epilog = "[...]: the value without the flag, where the configuration says nothing else."


def _add(parser: Parser, flag: Flag, title: str | None) -> None:
    reading, option = dict(flag.reading), option_of(flag.name)
    if "type" in reading:
        reading = {"metavar": NAMED.get(flag.name) or NAMES.get(reading["type"], "true|false"), **reading}
    if flag.name == "prompt":
        reading["action"] = Prompts
    text = f"{flag.help} [{flag.default}]".replace("%", "%%")
    where = parser.group(title) if title else parser
    where.add_argument(option, *ALIASES.get(flag.name, ()), help=text, **{"dest": flag.name, **reading})
    if title and flag.name in _after_dots(GROUPS[title]):
        parser.rare.add(option)


def group_of(name: str) -> str | None:
    """The group of a setting's flag."""
    return next((title for title, names in GROUPS.items() if name in names), None)


def _after_dots(names: tuple[Any, ...]) -> tuple[Any, ...]:
    return names[names.index(...) + 1 :] if ... in names else ()


def option_of(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


class Prompts(argparse.Action):
    """Gathers prompts over all its uses, and notes those that may be one prompt without its quotes."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *values])
        if unquoted(values):
            namespace.unquoted = values


def unquoted(prompts: list[str]) -> bool:
    """Whether these may be the words of one prompt. Numbers are those of classes."""
    return len(prompts) > 1 and not any(len(one.split()) > 1 for one in prompts) and not all(map(_is_number, prompts))


def _is_number(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal()


def take_size(args: argparse.Namespace) -> None:
    """Turns --size, or --width and --height, into `image_size`. Raises ConfigError for half a size, or for two."""
    size, width, height = (getattr(args, name, None) for name in ("size", "width", "height"))
    given = [f"--{name}" for name in ("size", "width", "height") if getattr(args, name, None) is not None]
    if not given:
        return
    if (width is None) != (height is None):
        missing = "height" if height is None else "width"
        raise ConfigError(f"{given[-1]} is half a size; give --{missing} as well, or --size WxH")
    if args.image_size is not None or (size is not None and width is not None):
        raise ConfigError(f"{given[0]} says the size, and so does another flag; give it once")
    if size is not None:
        width, _, height = size.lower().replace("×", "x").partition("x")
        if not (width.isdecimal() and height.isdecimal() and len(width) < 7 and len(height) < 7):
            raise ConfigError(f"--size is {size!r}; write width x height in pixels, such as 640x480")
    args.image_size = [int(height), int(width)]
    args.size = args.width = args.height = None


def prefer_flags_of_size(args: argparse.Namespace) -> None:
    """Has a size that the flags say beat the image_size of the configuration. Raises ConfigError as `take_size`."""
    take_size(args)
    if (args.resolution or args.aspect_ratio) and not args.image_size:
        args.cfg_options = ["image_size=None", *(args.cfg_options or [])]
