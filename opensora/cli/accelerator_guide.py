"""The flags of demo_open_sora.py and benchmark_open_sora.py: one for the weights of each part, all others as usual."""

from __future__ import annotations

import argparse
import logging

from opensora.checkpoints.hub import locate
from opensora.cli.flags import add_flags, prefer_flags_of_size
from opensora.cli.merge import settings_of
from opensora.cli.parser import Parser
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError

logger = logging.getLogger("opensora")

PUBLISHED = "configs/opensora-v1-2/inference/sample.py"  # the configuration that the four flags of weights belong to
PROMPT = "a beautiful waterfall."
PATHS = {"ckpt_path_dit": "ckpt_path", "ckpt_path_t5": "text_encoder_path", "ckpt_path_vae3d": "vae_path"}


def guide_parser(description: str) -> Parser:
    """The command line of both programs."""
    parser = Parser(description=description, usage="%(prog)s [flags]")
    parser.add_argument("--config", help=f"configuration; default: 'embedded', or {PUBLISHED} where weights are given")
    parser.add_argument("--ckpt-path-dit", help="weights of the model (OpenSora-STDiT-v3)")
    parser.add_argument("--ckpt-path-t5", help="weights of the text encoder (t5-v1_1-xxl)")
    parser.add_argument("--ckpt-path-vae2d", help="the per-frame autoencoder; its weights are in those of vae3d too")
    parser.add_argument("--ckpt-path-vae3d", help="weights of the autoencoder (OpenSora-VAE-v1.2)")
    add_flags(parser, InferenceSettings)
    return parser


def add_counts(parser: Parser) -> None:
    """Adds the flags of a benchmark."""
    group = parser.group("benchmark")
    group.add_argument("--warmup-count", type=int, default=3, metavar="N", help="untimed runs at the start [3]")
    group.add_argument("--eval-count", type=int, default=5, metavar="N", help="timed runs [5]")
    report = "./benchmark/report.json"
    group.add_argument("--benchmark-save-path", default=report, metavar="FILE", help=f"JSON file to write [{report}]")


def guide_settings(args: argparse.Namespace) -> InferenceSettings:
    """The settings that such flags ask for. Raises ConfigError or WeightsError."""
    given = [name for name in (*PATHS, "ckpt_path_vae2d") if getattr(args, name)]
    if args.config is None:
        args.config = PUBLISHED if given else "embedded"
    for name, usual in PATHS.items():
        if getattr(args, name):
            setattr(args, usual, getattr(args, name))
    if args.ckpt_path_vae2d:
        _check_vae2d(args)
    if args.prompt is None and args.prompt_path is None:
        args.prompt = [PROMPT]
    prefer_flags_of_size(args)
    return settings_of(InferenceSettings, args)


def _check_vae2d(args: argparse.Namespace) -> None:
    """Raises WeightsError if these weights are not there, ConfigError if those that hold them too are not given."""
    locate(args.ckpt_path_vae2d, what="vae2d", offline=True)
    if not args.ckpt_path_vae3d:
        raise ConfigError("--ckpt-path-vae2d is a part of the autoencoder alone; give --ckpt-path-vae3d, too")
    logger.info("vae2d         not read: %s holds the per-frame autoencoder, too", args.ckpt_path_vae3d)
