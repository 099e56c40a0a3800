"""Searches batch sizes for buckets: python scripts/misc/search_bs.py CONFIG [--data-path TABLE] [flags]."""

import sys

from opensora.training.search_report import search_batch_sizes
from opensora.utils.config_utils import parse_search_args, run_program


def main() -> int:
    search_batch_sizes(parse_search_args())
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
