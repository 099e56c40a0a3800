"""Generates from a configuration: python scripts/inference.py CONFIG [--prompt "..."] [flags]."""

import sys

from opensora.cli.program import run_program
from opensora.cli.verbs import generation
from opensora.utils.config_utils import parse_inference_args, with_script_defaults

if __name__ == "__main__":
    sys.exit(run_program(lambda: generation.generate(with_script_defaults(parse_inference_args()))))
