"""The flags of a command, declared by the fields of its settings: type, default, help and group."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from opensora.cli.parser import Parser, StoreAction
from opensora.config import load_config
from opensora.config.settings import InferenceSettings, TrainSettings
from opensora.errors import ConfigError

SettingsClass = type[InferenceSettings] | type[TrainSettings]
CONFIGURED = "as configured"


def boolean(text: str | bool) -> bool:
    """True for true, t, yes, y, 1; False for false, f, no, n, 0 (any case); argparse.ArgumentTypeError otherwise."""
    word = str(text).lower()
    if word not in ("true", "t", "yes", "y", "1", "false", "f", "no", "n", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return word in ("true", "t", "yes", "y", "1")


# A setting has a flag of its own name. These flags set a key of a section: type, help, target.
SECTION_FLAGS = {
    "ckpt_path": (str, "weights of the model", "model.from_pretrained"),
    "flash_attn": (boolean, "accepted, without effect", "model.enable_flash_attn"),
    "layernorm_kernel": (boolean, "accepted, without effect", "model.enable_layernorm_kernel"),
    "data_path": (str, "table of the data set", "dataset.data_path"),
    "captions": (str, "rows that must have a caption: mostly, required or optional", "dataset.captions"),
    "vae_path": (str, "weights of the autoencoder", "vae.from_pretrained"),
    "text_encoder_path": (str, "weights of the text encoder", "text_encoder.from_pretrained"),
}
SAMPLING_FLAGS = {
    "num_sampling_steps": (int, "sampling steps", "scheduler.num_sampling_steps"),
    "cfg_scale": (float, "classifier-free guidance scale", "scheduler.cfg_scale"),
}
TRAINING_FLAGS = {
    "lora_rank": (int, "train an adapter (LoRA) of this rank instead of the model", "lora.rank"),
    "lora_alpha": (float, "alpha of the adapter; default: its rank", "lora.alpha"),
}
# Aliases of other programs.
ALIASES = {
    "num_sampling_steps": ("--steps", "--num-inference-steps"),
    "cfg_scale": ("--guidance-scale",),
    "loop": ("--loops",),
    "output": ("-o",),
}
# Training flags that scripts/inference.py accepts; `opensora generate` does not.
SCRIPT_FLAGS = ("outputs", "data_path", "captions")
ARGUMENTS: dict[str, dict[str, Any]] = {
    "int": {"type": int}, "float": {"type": float}, "str": {"type": str}, "bool": {"type": boolean},
    "Sequence[str]": {"type": str, "nargs": "+"}, "tuple[int, int]": {"type": int, "nargs": 2},
    "tuple[float, float]": {"type": float, "nargs": 2},
}  # fmt: skip
TYPE_METAVARS = {int: "N", float: "X", str: "TEXT", boolean: "true|false"}
METAVARS = {
    "image_size": ("H", "W"), "guidance_interval": ("FROM", "TO"), "aspect_ratio": "H:W", "num_frames": "N|4s",
    "keep": "N|1s", "fps": "N",
    **dict.fromkeys(("ckpt_path", "vae_path", "text_encoder_path"), "PATH"),
    **dict.fromkeys(("prompt_path", "output", "image", "first_frame", "last_frame", "extend", "edit"), "FILE"),
    **dict.fromkeys(("save_dir", "outputs", "load"), "FOLDER"), "data_path": "TABLE", "prompt": "PROMPT",
    "lora": "FILE[:STRENGTH]",
}  # fmt: skip


class Flag(NamedTuple):
    """A flag: the setting it sets, keyword arguments of `add_argument`, help, and the default that help shows."""

    name: str
    arguments: dict[str, Any]
    help: str
    default: str


def flags_of(kind: SettingsClass, config: Mapping[str, Any] | None = None) -> Iterator[Flag]:
    """Every flag of these settings. Defaults are those of `config`, else of the fields."""
    config = config or {}
    for field in dataclasses.fields(kind):
        if field.metadata.get("help"):
            default = config.get(field.name, field.default)
            yield Flag(field.name, _arguments(field), field.metadata["help"], _default_text(default))
    sections = SECTION_FLAGS | (SAMPLING_FLAGS if issubclass(kind, InferenceSettings) else TRAINING_FLAGS)
    for name, (convert, text, target) in sections.items():
        section, key = target.split(".")
        default = (config.get(section) or {}).get(key, dataclasses.MISSING)
        yield Flag(name, {"type": convert}, text, _default_text(default))


def _arguments(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """How argparse reads the values of a setting's flag; a flag that is not given is None."""
    nargs = field.metadata["nargs"]
    if nargs == 0:
        return {"action": "store_true", "default": None}
    if nargs == "?":  # alone it means True, and an empty text False
        return {"type": lambda text: bool(text) and boolean(text), "nargs": "?", "const": True}
    return ARGUMENTS[str(field.type).split(" | ")[0]]


def _default_text(default: Any) -> str:
    if default is dataclasses.MISSING:
        return CONFIGURED
    if default is None or default == "":
        return "none"
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


# Group of `generate --help` -> its flags; only --help-all shows those after `...`.
GROUPS: dict[str, tuple[Any, ...]] = {
    "prompts and model": (
        "prompt", "negative_prompt", "prompt_path", "num_sample", "seed", "model", ...,
        "start_index", "end_index", "aes", "flow", "camera_motion", "prompt_generator",
        "llm_refine", "llm_base_url", "llm_model", "cfg_options", "trust_config",
    ),
    "size and length": (
        "size", "width", "height", "resolution", "aspect_ratio", "num_frames", "image_size", "fps", ...,
        "save_fps", "frame_interval",
    ),
    "image and video conditioning": (
        "image", "first_frame", "last_frame", "extend", "keep", "edit", "strength", ...,
        "reference_path", "mask_strategy",
    ),
    "sampling": ("num_sampling_steps", "cfg_scale", "steps_until", "draft", ..., "guidance_interval"),
    "long videos": ("loop", ..., "condition_frame_length"),
    "weights": (
        "ckpt_path", "vae_path", "text_encoder_path", "lora", "offline", ...,
        "fuse_lora", "any_base", "allow_downloads",
    ),
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
CONFIG_FLAGS = (
    Flag("trust_config", {"action": "store_true"}, "run the configuration as a program", "no"),
    Flag("cfg_options", {"nargs": "+", "metavar": "KEY=VALUE"}, "other settings, such as model.depth=4", "none"),
)
SIZE_FLAGS = (  # aliases of other programs
    Flag("size", {"type": str, "metavar": "WxH"}, "width and height in pixels, such as 640x480", "none"),
    Flag("width", {"type": int}, "width in pixels, with --height", "none"),
    Flag("height", {"type": int}, "height in pixels, with --width", "none"),
)


def add_flags(
    parser: Parser, kind: SettingsClass, *, scripts: bool = True, extra: Sequence[Flag] = (),
    defaults_of: str | None = None, default_text: str | None = None,
) -> None:  # fmt: skip
    """Adds every flag of these settings but the configuration, and the `extra` ones.

    `scripts` also adds SCRIPT_FLAGS. Flags of inference come in groups, of which --help shows the common flags. Help
    shows `default_text` as every default, or the defaults of the configuration `defaults_of`, or those of the settings.
    """
    grouped = issubclass(kind, InferenceSettings)
    config = load_config(defaults_of)[0] if defaults_of else None
    flags = [flag for flag in flags_of(kind, config) if scripts or flag.name not in SCRIPT_FLAGS]
    flags += [*CONFIG_FLAGS, *(SIZE_FLAGS if grouped else ()), *extra]
    if grouped:
        order = [name for names in GROUPS.values() for name in names]
        flags.sort(key=lambda flag: order.index(flag.name) if flag.name in order else len(order))
    for flag in flags:
        shown = flag._replace(default=default_text) if default_text else flag
        _add(parser, shown, group_of(flag.name) if grouped else None)
    if grouped:
        parser.add_help_all()
    if defaults_of:
        parser.epilog = f"[...]: the default of the configuration {defaults_of!r}; others may differ."
    elif not default_text:
        parser.epilog = "[...]: the default where the configuration has none."


def _add(parser: Parser, flag: Flag, title: str | None) -> None:
    arguments, option = dict(flag.arguments), option_of(flag.name)
    if "type" in arguments:
        metavar = METAVARS.get(flag.name) or TYPE_METAVARS.get(arguments["type"], "true|false")
        arguments = {"metavar": metavar, **arguments}
    if flag.name == "prompt":
        arguments["action"] = PromptAction
    text = f"{flag.help} [{flag.default}]".replace("%", "%%")
    group = parser.group(title) if title else parser
    group.add_argument(option, *ALIASES.get(flag.name, ()), help=text, **{"dest": flag.name, **arguments})
    if title and flag.name in _after_dots(GROUPS[title]):
        parser.advanced.add(option)


def group_of(name: str) -> str | None:
    """The group of a setting's flag."""
    return next((title for title, names in GROUPS.items() if name in names), None)


def _after_dots(names: tuple[Any, ...]) -> tuple[Any, ...]:
    return names[names.index(...) + 1 :] if ... in names else ()


def option_of(name: str) -> str:
    """The spelling of a setting's flag."""
    return f"--{name.replace('_', '-')}"


class PromptAction(StoreAction):
    """Stores prompts; keeps as `unquoted` those that may be one prompt without its quotes."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, values, option_string)
        if looks_unquoted(values):
            namespace.unquoted = values


def looks_unquoted(prompts: list[str]) -> bool:
    """Whether these may be the words of one prompt without its quotes. Numbers are class labels."""
    return len(prompts) > 1 and not any(len(one.split()) > 1 for one in prompts) and not all(map(_is_number, prompts))


def _is_number(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal()


def merge_size_flags(args: argparse.Namespace) -> None:
    """Turns --size, or --width and --height, into `image_size`. Raises ConfigError for half a size, or for two."""
    size, width, height = (getattr(args, name, None) for name in ("size", "width", "height"))
    given = [f"--{name}" for name in ("size", "width", "height") if getattr(args, name, None) is not None]
    if not given:
        return
    if (width is None) != (height is None):
        missing = "height" if height is None else "width"
        raise ConfigError(f"{given[-1]} is half a size; give --{missing} as well, or --size WxH")
    if args.image_size is not None or (size is not None and width is not None):
        raise ConfigError(f"{given[0]} sets the size, and so does another flag; keep one")
    if size is not None:
        width, height = _parse_size(size)
    args.image_size = [height, width]
    args.size = args.width = args.height = None


def _parse_size(text: str) -> tuple[int, int]:
    """Width and height of `WxH`. Raises ConfigError."""
    width, _, height = text.lower().replace("×", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal() and len(width) < 7 and len(height) < 7):
        raise ConfigError(f"--size is {text!r}; write width x height in pixels, such as 640x480")
    return int(width), int(height)


def prefer_size_flags(args: argparse.Namespace) -> None:
    """Lets --resolution and --aspect-ratio override the image_size of the configuration. Raises ConfigError."""
    merge_size_flags(args)
    if (args.resolution or args.aspect_ratio) and not args.image_size:
        args.cfg_options = ["image_size=None", *(args.cfg_options or [])]
