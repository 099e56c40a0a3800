"""The command lines of the documents' scripts, under the module name that published documents link to."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from opensora.cli.flags import SettingsClass, add_flags
from opensora.cli.merge import settings_of
from opensora.cli.parser import Parser
from opensora.config.settings import InferenceSettings, SearchSettings, TrainSettings

logger = logging.getLogger("opensora")

PROMPTS = "./assets/texts/t2v_samples.txt"
# The flags of Open-Sora 1.2, whose scripts accept unambiguous prefixes of them.
_SHARED = (
    "seed", "ckpt-path", "batch-size", "outputs", "flash-attn", "layernorm-kernel", "resolution", "data-path", "dtype",
)  # fmt: skip
_INFERENCE = (
    *_SHARED, "save-dir", "sample-name", "start-index", "end-index", "num-sample", "prompt-as-path", "verbose",
    "prompt-path", "prompt", "llm-refine", "prompt-generator", "num-frames", "fps", "save-fps", "image-size",
    "frame-interval", "aspect-ratio", "watermark", "num-sampling-steps", "cfg-scale", "loop", "condition-frame-length",
    "reference-path", "mask-strategy", "aes", "flow", "camera-motion",
)  # fmt: skip
_TRAINING = (*_SHARED, "lr", "wandb", "load", "start-from-scratch", "warmup-steps")


def inference_parser() -> Parser:
    """The command line of scripts/inference.py."""
    parser = Parser(description="Generate images and videos from text, images or videos.")
    return _configured(parser, InferenceSettings, _INFERENCE)


def training_parser() -> Parser:
    """The command line of scripts/train.py and train_vae.py."""
    return _configured(Parser(description="Train a model."), TrainSettings, _TRAINING)


def search_parser() -> Parser:
    """The command line of scripts/misc/search_bs.py."""
    return _configured(Parser(description="Search the batch size of each bucket."), SearchSettings, _TRAINING)


def _configured(parser: Parser, kind: SettingsClass, published: Sequence[str]) -> Parser:
    parser.abbreviable = [f"--{name}" for name in published]
    parser.usage = "%(prog)s CONFIG [flags]"
    parser.add_argument("config", help="configuration file, or its name below configs/")
    add_flags(parser, kind)
    return parser


def parse_inference_args(argv: Sequence[str] | None = None) -> InferenceSettings:
    """The settings of an inference command line. Raises ConfigError; argparse exits with 2 on a wrong flag."""
    return settings_of(InferenceSettings, inference_parser().parse_args(argv))


def with_script_defaults(settings: InferenceSettings) -> InferenceSettings:
    """The settings with the defaults of Open-Sora's script: its sample prompts, and existing results are replaced."""
    overwrite = settings.overwrite or not settings.prompt_as_path
    settings = dataclasses.replace(settings, overwrite=overwrite)
    if settings.prompt or settings.prompt_path or not Path(PROMPTS).is_file():
        return settings
    logger.info("no prompt is given: using those of %s; --prompt and --prompt-path choose others", PROMPTS)
    return dataclasses.replace(settings, prompt_path=PROMPTS)


def parse_train_args(argv: Sequence[str] | None = None) -> TrainSettings:
    """The settings of a training command line. Raises ConfigError; argparse exits with 2 on a wrong flag."""
    return settings_of(TrainSettings, training_parser().parse_args(argv))


def parse_search_args(argv: Sequence[str] | None = None) -> SearchSettings:
    """The settings of a search's command line. Raises ConfigError; argparse exits with 2 on a wrong flag."""
    return settings_of(SearchSettings, search_parser().parse_args(argv))
