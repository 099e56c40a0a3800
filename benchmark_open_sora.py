"""Times a request on a device and writes a JSON report; without weights, with the embedded model.

python benchmark_open_sora.py [--device NAME] [--warmup-count 3] [--eval-count 5] [--benchmark-save-path FILE] [flags]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opensora.cli.accelerator_guide import guide_parser, guide_settings
from opensora.cli.program import run_program
from opensora.cli.verbs import generation


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, prints its table and the path of its report."""
    parser = guide_parser("Time text encoder, denoising and decoding on a device.")
    generation.add_benchmark_flags(parser)
    args = parser.parse_args(argv)
    return generation.benchmark(guide_settings(args), args)


if __name__ == "__main__":
    sys.exit(run_program(main))
