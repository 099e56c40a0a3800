"""How well clips fit their captions: python -m tools.scoring.matching TABLE --clip FOLDER, as `opensora data curate ...
--stages scores`."""

from __future__ import annotations

import argparse
import sys

from opensora.cli.parser import Parser
from tools.door import Door, add_stage_arguments, curated


def add_weights(parser: Parser) -> None:
    """CLIP's folder, which the original's programs download."""
    parser.add_argument("--clip", metavar="FOLDER", help="CLIP ViT-L/14 in transformers' layout")


def _add_arguments(parser: Parser) -> None:
    add_stage_arguments(parser)
    add_weights(parser)


def _command(args: argparse.Namespace) -> list[str]:
    return curated(args, "scores", "match", *([f"scores.clip={args.clip}"] if args.clip else []))


DOOR = Door("tools.scoring.matching", _add_arguments, _command)

if __name__ == "__main__":
    sys.exit(DOOR.run())
