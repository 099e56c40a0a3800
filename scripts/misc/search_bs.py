"""Searches batch sizes for buckets: python scripts/misc/search_bs.py CONFIG [--data-path TABLE] [flags]."""

import sys

from opensora.cli import search
from opensora.utils.config_utils import parse_search_args, run_program

if __name__ == "__main__":
    sys.exit(run_program(lambda: search(parse_search_args())))
