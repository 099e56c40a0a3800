"""Camera motion: python -m tools.caption.camera_motion_detect TABLE, as `opensora data curate ... --stages camera`."""

from __future__ import annotations

import argparse
import sys

from opensora.cli.parser import Parser
from tools.door import Door, add_stage_arguments, curated, refuse

THRESHOLD = "is in pixels of the original's flow; set camera.shift, camera.zoom and camera.roll of opensora data curate"


def _add_arguments(parser: Parser) -> None:
    add_stage_arguments(parser)
    refuse(parser, THRESHOLD, "--threshold")


def _command(args: argparse.Namespace) -> list[str]:
    return curated(args, "camera", "cmotion")


DOOR = Door("tools.caption.camera_motion_detect", _add_arguments, _command)

if __name__ == "__main__":
    sys.exit(DOOR.run())
