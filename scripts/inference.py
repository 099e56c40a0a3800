"""Generates from a configuration: python scripts/inference.py CONFIG [--prompt "..."] [flags]."""

import sys

from opensora.cli import generate, keeping_names
from opensora.utils.config_utils import parse_inference_args, run_program, with_prompts

if __name__ == "__main__":
    sys.exit(run_program(lambda: generate(keeping_names(with_prompts(parse_inference_args())))))
