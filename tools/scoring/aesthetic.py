"""Aesthetic scores: python -m tools.scoring.aesthetic TABLE --clip FOLDER --aesthetic FILE.

The same as `opensora data curate ... --stages scores`.
"""

from __future__ import annotations

import argparse
import sys

from opensora.cli.parser import Parser
from tools.door import Door, add_stage_arguments, curated, refuse
from tools.scoring.matching import add_weights


def _add_arguments(parser: Parser) -> None:
    add_stage_arguments(parser)
    add_weights(parser)
    parser.add_argument("--aesthetic", metavar="FILE", help="the published head (sac+logos+ava1-l14-linearMSE.pth)")
    text = "has no effect: the ledger has what is computed already"
    parser.add_argument("--skip_if_existing", "--skip-if-existing", action="store_true", help=text)
    reason = "scores of opensora data curate are the mean of three frames, as those of published tables"
    refuse(parser, reason, "--num_frames", "--num-frames")


def _command(args: argparse.Namespace) -> list[str]:
    files = {"clip": args.clip, "aesthetic": args.aesthetic}
    return curated(args, "scores", "aes", *(f"scores.{name}={file}" for name, file in files.items() if file))


DOOR = Door("tools.scoring.aesthetic", _add_arguments, _command)

if __name__ == "__main__":
    sys.exit(DOOR.run())
