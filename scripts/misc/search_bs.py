"""Searches batch sizes for buckets: python scripts/misc/search_bs.py CONFIG [--data-path TABLE] [flags]."""

import sys

from opensora.cli.program import run_program
from opensora.cli.verbs import training
from opensora.utils.config_utils import parse_search_args

if __name__ == "__main__":
    sys.exit(run_program(lambda: training.search_batch_sizes(parse_search_args())))
