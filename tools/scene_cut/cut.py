"""Clips as files: python -m tools.scene_cut.cut TABLE --save_dir FOLDER, as `opensora data cut`."""

from __future__ import annotations

import argparse
import sys

from opensora.cli.parser import Parser
from tools.door import Door

FLAGS = ("min_seconds", "max_seconds", "target_fps", "shorter_size")


def _add_arguments(parser: Parser) -> None:
    parser.add_argument("meta_path", metavar="TABLE", help="table of clips with start_pts and end_pts")
    parser.add_argument("--save_dir", "--save-dir", required=True, metavar="FOLDER", help="folder for the files")
    for flag in FLAGS:
        kind = int if flag == "shorter_size" else float
        parser.add_argument(f"--{flag}", f"--{flag.replace('_', '-')}", type=kind, help="as of opensora data cut")
    parser.add_argument("--num_workers", "--num-workers", type=int, metavar="N", help="processes [one per core]")


def _command(args: argparse.Namespace) -> list[str]:
    given = {flag: getattr(args, flag) for flag in FLAGS} | {"workers": args.num_workers}
    flags = [(f"--{flag.replace('_', '-')}", str(value)) for flag, value in given.items() if value is not None]
    return ["data", "cut", args.meta_path, "--output", args.save_dir, *(word for pair in flags for word in pair)]


DOOR = Door("tools.scene_cut.cut", _add_arguments, _command)

if __name__ == "__main__":
    sys.exit(DOOR.run())
