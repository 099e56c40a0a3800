"""Makes a video on a device; without weights, with the embedded model.

python demo_open_sora.py [--device NAME] [--ckpt-path-dit DIR --ckpt-path-t5 DIR --ckpt-path-vae3d DIR] [flags]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opensora.cli import generate
from opensora.cli.accelerator_guide import guide_parser, guide_settings
from opensora.cli.program import run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Makes what the flags ask for and prints the path of each result."""
    return generate(guide_settings(guide_parser("Make videos on a device.").parse_args(argv)))


if __name__ == "__main__":
    sys.exit(run_program(main))
