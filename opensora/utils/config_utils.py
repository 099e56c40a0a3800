"""The command lines of the documents' programs. What they are made of lies in `opensora/cli/`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from opensora.cli.flags import add_flags, boolean
from opensora.cli.merge import merge, settings_of
from opensora.cli.parser import Parser
from opensora.cli.program import run_program
from opensora.config.settings import InferenceSettings, SearchSettings, TrainSettings

__all__ = [
    "add_flags", "boolean", "inference_parser", "merge", "parse_inference_args", "parse_search_args",
    "parse_train_args", "run_program", "search_parser", "settings_of", "training_parser", "with_prompts",
]  # fmt: skip

logger = logging.getLogger("opensora")

PROMPTS = "./assets/texts/t2v_samples.txt"
# The flags that Open-Sora 1.2 had. Its programs took their beginnings, too, and so do commands that are in use.
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


def _configured(parser: Parser, kind: type, published: Sequence[str]) -> Parser:
    parser.beginnings = [f"--{name}" for name in published]
    parser.usage = "%(prog)s CONFIG [flags]"
    parser.add_argument("config", help="configuration file, or its name below configs/")
    add_flags(parser, kind)
    return parser


def parse_inference_args(argv: Sequence[str] | None = None) -> InferenceSettings:
    """The settings of an inference command line. Raises ConfigError; argparse exits with 2 on a wrong flag."""
    return settings_of(InferenceSettings, inference_parser().parse_args(argv))


def with_prompts(settings: InferenceSettings) -> InferenceSettings:
    """The settings, with the prompts that 1.0 and 1.1 take by default where none are given, as in commands of 1.2."""
    if settings.prompt or settings.prompt_path or not Path(PROMPTS).is_file():
        return settings
    logger.info("no prompt is given: those of %s are made; --prompt or --prompt-path says which", PROMPTS)
    return dataclasses.replace(settings, prompt_path=PROMPTS)


def parse_train_args(argv: Sequence[str] | None = None) -> TrainSettings:
    """The settings of a training command line. Raises ConfigError; argparse exits with 2 on a wrong flag."""
    return settings_of(TrainSettings, training_parser().parse_args(argv))


def parse_search_args(argv: Sequence[str] | None = None) -> SearchSettings:
    """The settings of a search's command line. Raises ConfigError; argparse exits with 2 on a wrong flag."""
    return settings_of(SearchSettings, search_parser().parse_args(argv))
