"""Generates a video on a device; without weights, with the embedded model.

python demo_open_sora.py [--device NAME] [--ckpt-path-dit DIR --ckpt-path-t5 DIR --ckpt-path-vae3d DIR] [flags]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opensora.cli.accelerator_guide import guide_parser, guide_settings
from opensora.cli.program import run_program
from opensora.cli.verbs import generation


def main(argv: Sequence[str] | None = None) -> int:
    """Generates the requested samples and prints the path of each."""
    return generation.generate(guide_settings(guide_parser("Generate videos on a device.").parse_args(argv)))


if __name__ == "__main__":
    sys.exit(run_program(main))
