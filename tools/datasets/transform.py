"""Copies of media in other forms, which nothing here needs: each task is refused with what to use."""

from __future__ import annotations

import argparse
import sys

from opensora.cli.parser import Parser
from opensora.errors import ConfigError
from tools.door import Door

REPLACEMENTS = {
    "img_resize": "training resizes each image to its bucket; train on the table as it is",
    "img_rand_crop": "training crops each clip to its bucket; write other rectangles into the table's column crop",
    "vid_frame_extract": "stages decode the frames that they need; see those of training with "
    "opensora data show TABLE CONFIG --output sheet.png",
}


def _add_arguments(parser: Parser) -> None:
    parser.add_argument("task", choices=REPLACEMENTS, help="what to make")
    for name in ("meta_path", "input_dir", "output_dir"):
        parser.add_argument(name, nargs="?", help=argparse.SUPPRESS)
    for flag in ("--length", "--points", "--points_index", "--seed"):
        parser.add_argument(flag, nargs="+", help=argparse.SUPPRESS)


def _command(args: argparse.Namespace) -> list[str]:
    raise ConfigError(f"{args.task} makes copies that are not needed: {REPLACEMENTS[args.task]}")


DOOR = Door("tools.datasets.transform", _add_arguments, _command)

if __name__ == "__main__":
    sys.exit(DOOR.run())
