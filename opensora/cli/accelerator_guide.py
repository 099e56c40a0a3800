"""The flags of demo_open_sora.py and benchmark_open_sora.py: those of `generate`, and one for each weight file."""

from __future__ import annotations

import argparse
import logging

from opensora.checkpoints.hub import locate
from opensora.cli.flags import add_flags, prefer_size_flags
from opensora.cli.merge import settings_of
from opensora.cli.parser import Parser
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError

logger = logging.getLogger("opensora")

PUBLISHED = "configs/opensora-v1-2/inference/sample.py"  # the configuration of the four weight flags
PROMPT = "a beautiful waterfall."
WEIGHT_FLAGS = {"ckpt_path_dit": "ckpt_path", "ckpt_path_t5": "text_encoder_path", "ckpt_path_vae3d": "vae_path"}


def guide_parser(description: str) -> Parser:
    """The command line of both scripts."""
    parser = Parser(description=description, usage="%(prog)s [flags]")
    parser.add_argument("--config", help=f"configuration; default: 'embedded', or {PUBLISHED} with weight flags")
    parser.add_argument("--ckpt-path-dit", help="weights of the model (OpenSora-STDiT-v3)")
    parser.add_argument("--ckpt-path-t5", help="weights of the text encoder (t5-v1_1-xxl)")
    parser.add_argument("--ckpt-path-vae2d", help="weights of the 2D autoencoder; accepted, vae3d contains them")
    parser.add_argument("--ckpt-path-vae3d", help="weights of the autoencoder (OpenSora-VAE-v1.2)")
    add_flags(parser, InferenceSettings, defaults_of="embedded")
    return parser


def guide_settings(args: argparse.Namespace) -> InferenceSettings:
    """The settings of the parsed flags. Raises ConfigError or WeightsError."""
    given = [name for name in (*WEIGHT_FLAGS, "ckpt_path_vae2d") if getattr(args, name)]
    if args.config is None:
        args.config = PUBLISHED if given else "embedded"
    for name, target in WEIGHT_FLAGS.items():
        if getattr(args, name):
            setattr(args, target, getattr(args, name))
    if args.ckpt_path_vae2d:
        _check_vae2d(args)
    if args.prompt is None and args.prompt_path is None:
        args.prompt = [PROMPT]
    prefer_size_flags(args)
    return settings_of(InferenceSettings, args)


def _check_vae2d(args: argparse.Namespace) -> None:
    """Raises WeightsError if these weights are missing, ConfigError without --ckpt-path-vae3d."""
    locate(args.ckpt_path_vae2d, what="vae2d", offline=True)
    if not args.ckpt_path_vae3d:
        raise ConfigError("--ckpt-path-vae2d is only a part of the autoencoder; add --ckpt-path-vae3d")
    logger.info("vae2d         not read: %s contains the 2D autoencoder", args.ckpt_path_vae3d)
