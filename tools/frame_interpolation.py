"""Frames between frames (AMT), which has no part here: refused, with what to use."""

from __future__ import annotations

import argparse
import sys

from opensora.cli.parser import Parser
from opensora.errors import ConfigError
from tools.door import Door


def _add_arguments(parser: Parser) -> None:
    parser.add_argument("input", help="video or folder")
    for flag in ("--ckpt", "--niters", "--fps", "--output_path", "--folder"):
        parser.add_argument(flag, help=argparse.SUPPRESS)


def _command(args: argparse.Namespace) -> list[str]:
    reason = "frames are not interpolated here: AMT is another project's model with its own weights"
    raise ConfigError(f"{reason}; generate more frames with opensora generate --num-frames N, or use its repository")


DOOR = Door("tools.frame_interpolation", _add_arguments, _command)

if __name__ == "__main__":
    sys.exit(DOOR.run())
